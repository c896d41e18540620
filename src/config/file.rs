//! Reads a small text file, and says plainly why it couldn't.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The largest file that is read, in bytes: 4 MiB.
const LARGEST: u64 = 4 << 20;

/// The text of `path`; the error is one line that names it.
pub(super) fn read_text(path: &Path) -> Result<String, String> {
    let name = path.display();
    let fail = |error: std::io::Error| format!("{name}: can't be read: {error}");
    let file = File::open(path).map_err(fail)?;
    if file.metadata().map_err(fail)?.is_dir() {
        return Err(format!("{name}: is a directory; name a file in it"));
    }
    let mut bytes = Vec::new();
    // Pipes have no size beforehand (`--config <(…)`), so the limit is on what is read.
    file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > LARGEST {
        return Err(format!("{name}: is larger than 4 MiB"));
    }
    String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = before.split(|byte| *byte == b'\n').count();
        format!("{name}:{line}: is not UTF-8; save the file as UTF-8")
    })
}
