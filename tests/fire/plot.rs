//! Curves over time as an SVG: one panel below the other, one axis of time for all.
//!
//! No library and no fonts: the file is looked at in a browser, in light or in dark.

use std::fmt::Write as _;

const WIDTH: f64 = 760.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 56.0;
const HEIGHT: f64 = 170.0;
const BETWEEN: f64 = 52.0;
const BELOW: f64 = 46.0;

/// One curve, from zero up.
pub struct Panel<'a> {
    pub label: &'a str,
    /// Seconds, and what was seen then.
    pub points: Vec<(f64, f64)>,
    /// A level to compare with, and what it is.
    pub line: Option<(f64, &'a str)>,
}

const STYLE: &str = "text{font:13px system-ui,sans-serif;fill:#1f2328}.title{font-weight:600;font-size:15px}\
    .small{font-size:12px;fill:#59636e}.grid{stroke:#d1d9e0;stroke-width:1}.zero{stroke:#59636e;stroke-dasharray:4 3}\
    .level{stroke:#bc4c00;stroke-dasharray:6 4}.levelname{fill:#bc4c00;font-size:12px}\
    .curve{fill:none;stroke:#0969da;stroke-width:2;stroke-linejoin:round}\
    @media(prefers-color-scheme:dark){text{fill:#f0f6fc}.small{fill:#9198a1}.grid{stroke:#3d444d}.zero{stroke:#9198a1}\
    .level{stroke:#f0883e}.levelname{fill:#f0883e}.curve{stroke:#4493f8}}";

/// Draws the panels. The moment zero is marked.
#[expect(clippy::cast_precision_loss, reason = "a few panels")]
pub fn draw(title: &str, time: &str, panels: &[Panel<'_>]) -> String {
    let height = TOP + panels.len() as f64 * (HEIGHT + BETWEEN) - BETWEEN + BELOW;
    let seconds = || panels.iter().flat_map(|panel| &panel.points).map(|point| point.0);
    let (first, last) = (seconds().fold(f64::INFINITY, f64::min), seconds().fold(f64::NEG_INFINITY, f64::max));
    let x = |second: f64| LEFT + (second - first) / (last - first) * (WIDTH - LEFT - RIGHT);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         role=\"img\" aria-label=\"{title}\">\n<style>{STYLE}</style>\n<text class=\"title\" x=\"{LEFT}\" y=\"22\">{title}</text>\n"
    );
    for (index, panel) in panels.iter().enumerate() {
        let top = TOP + index as f64 * (HEIGHT + BETWEEN);
        axes(&mut svg, panel, top, first, last, &x);
        curve(&mut svg, panel, top, &x);
    }
    let bottom = height - 10.0;
    let middle = f64::midpoint(LEFT, WIDTH - RIGHT);
    let _ = writeln!(
        svg,
        "<text class=\"small\" x=\"{middle}\" y=\"{bottom}\" text-anchor=\"middle\">{time}</text>\n</svg>"
    );
    svg
}

fn axes(svg: &mut String, panel: &Panel<'_>, top: f64, first: f64, last: f64, x: &impl Fn(f64) -> f64) {
    let (highest, bottom) = (highest(panel), top + HEIGHT);
    let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"{:.0}\">{}</text>", top - 10.0, panel.label);
    let step = step(highest, 4.0);
    let mut value = 0.0;
    while value <= highest {
        let y = bottom - value / highest * HEIGHT;
        let _ = writeln!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{}\"/><text class=\"small\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            y + 4.0
        );
        value += step;
    }
    let _ = writeln!(svg, "<path class=\"zero\" d=\"M{:.1} {top}V{bottom}\"/>", x(0.0));
    let wide = self::step(last - first, 8.0);
    let mut second = (first / wide).ceil() * wide;
    while second <= last {
        let _ = writeln!(
            svg,
            "<text class=\"small\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x(second),
            bottom + 18.0,
            second + 0.0
        );
        second += wide;
    }
    if let Some((level, name)) = panel.line {
        let y = bottom - level / highest * HEIGHT;
        let _ = writeln!(
            svg,
            "<path class=\"level\" d=\"M{LEFT} {y:.1}H{end}\"/><text class=\"levelname\" x=\"{end}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>",
            y - 6.0,
            end = WIDTH - RIGHT
        );
    }
}

fn curve(svg: &mut String, panel: &Panel<'_>, top: f64, x: &impl Fn(f64) -> f64) {
    let highest = highest(panel);
    let points: Vec<String> = panel
        .points
        .iter()
        .map(|(second, value)| format!("{:.1},{:.1}", x(*second), top + HEIGHT - value / highest * HEIGHT))
        .collect();
    let _ = writeln!(svg, "<polyline class=\"curve\" points=\"{}\"/>", points.join(" "));
}

/// Where the axis ends.
fn highest(panel: &Panel<'_>) -> f64 {
    let level = panel.line.map_or(0.0, |(level, _)| level * 1.15);
    panel.points.iter().map(|point| point.1).fold(level, f64::max).max(1.0)
}

/// A round step that divides a length into about so many.
fn step(length: f64, parts: f64) -> f64 {
    let rough = length / parts;
    let power = 10_f64.powf(rough.log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|times| times * power).find(|step| *step >= rough).unwrap_or(rough)
}
