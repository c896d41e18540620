//! Why a connection could not be made, in words that an operator can act on. Never with a URL: that may hold a password.

use redis::{ConnectionAddr, ErrorKind, RedisError};

/// The error, and what may be behind it where its own words don't say so.
pub(super) fn words(error: &anyhow::Error, addr: &ConnectionAddr) -> String {
    let failed = error.chain().find_map(|cause| cause.downcast_ref::<RedisError>());
    // What is around it says only that a connection was to be made.
    let said = failed.map_or_else(|| format!("{error:#}"), ToString::to_string);
    let encrypted = matches!(addr, ConnectionAddr::TcpTls { .. });
    let hint = match failed {
        _ if said.contains("UnknownIssuer") || said.contains("BadSignature") => {
            "its certificate is not of an authority in cache.ca_file, or of the system's"
        }
        _ if said.contains("Expired") || said.contains("certificate expired") => "its certificate has expired",
        _ if said.contains("NotValidForName") || said.contains("not valid for name") => {
            "its certificate is for another name than cache.url has"
        }
        Some(failed) if !encrypted && (failed.is_connection_dropped() || failed.is_timeout()) => {
            "if the server wants TLS, write rediss://"
        }
        Some(failed) if encrypted && failed.is_timeout() || said.contains("InvalidContentType") => {
            "if the server does not speak TLS on this port, write redis://"
        }
        Some(failed) if failed.kind() == ErrorKind::AuthenticationFailed => {
            "the user or password in cache.url is wrong"
        }
        _ if said.contains("NOAUTH") => "the server wants a password: cache.url has none",
        _ => return said,
    };
    format!("{said} ({hint})")
}
