//! Files: the configuration's own, and mounted secrets.

use std::path::Path;

use super::{BASE, bare, env, under};
use crate::config::{Config, Env};

fn load(file: &Path) -> Result<Option<Config>, String> {
    Config::load(Some(file), &Env::default()).map_err(|error| error.to_string())
}

#[test]
fn neither_a_file_nor_a_url_is_the_demo() {
    assert_eq!(bare(&[]), Ok(None));
    assert_eq!(bare(&[("CACHE_ASIDE_CONFIG", ""), ("DATABASE_URL", ""), ("CACHE_TTL", "5")]), Ok(None));
}

#[test]
fn a_url_without_a_file_needs_no_resources() {
    let config = bare(&[("DATABASE_URL", "sqlite:a.db")]).unwrap().unwrap();
    assert!(config.resources.is_empty());
    assert_eq!(config.cache.url.expose(), "memory:");
    assert!(bare(&[("CACHE_ASIDE__DATABASE__URL", "sqlite:a.db")]).unwrap().is_some());
    assert_eq!(
        bare(&[("CACHE_ASIDE__DATABASE__URL", "")]),
        Err("CACHE_ASIDE__DATABASE__URL: database.url is missing: set it in the file or DATABASE_URL".into())
    );
}

#[test]
fn the_flag_beats_the_variable() {
    let folder = tempfile::tempdir().unwrap();
    let (flag, variable) = (folder.path().join("flag.yaml"), folder.path().join("variable.yaml"));
    std::fs::write(&flag, format!("{BASE}cache: {{ key_prefix: flag }}\n")).unwrap();
    std::fs::write(&variable, format!("{BASE}cache: {{ key_prefix: variable }}\n")).unwrap();
    let env = env(&[("CACHE_ASIDE_CONFIG", variable.to_str().unwrap())]);
    let prefix = |file: Option<&Path>| Config::load(file, &env).unwrap().unwrap().cache.key_prefix;
    assert_eq!(prefix(Some(&flag)), "flag");
    assert_eq!(prefix(None), "variable");
}

#[test]
fn a_file_that_can_not_be_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let shown = |path: &Path| path.display().to_string();
    let missing = folder.path().join("missing.yaml");
    assert!(load(&missing).unwrap_err().starts_with(&format!("{}: can't be read: ", shown(&missing))));
    assert_eq!(load(folder.path()), Err(format!("{}: is a directory; name a file in it", shown(folder.path()))));
    let bytes = folder.path().join("bytes.yaml");
    std::fs::write(&bytes, b"server:\n  listen: \xff\n").unwrap();
    assert_eq!(load(&bytes), Err(format!("{}:2: is not UTF-8; save the file as UTF-8", shown(&bytes))));
    let large = folder.path().join("large.yaml");
    std::fs::write(&large, " ".repeat((4 << 20) + 1)).unwrap();
    assert_eq!(load(&large), Err(format!("{}: is larger than 4 MiB", shown(&large))));
    let empty = folder.path().join("empty.yaml");
    std::fs::write(&empty, "").unwrap();
    assert!(load(&empty).unwrap_err().contains("database.url is missing"));
}

#[test]
fn a_secret_may_stand_in_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let secret = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (url, password) = (secret("url", "sqlite:a.db\r\n"), secret("password", "p@ss\n\n"));
    let database = |variables: &[(&str, &str)]| under(variables).map(|config| config.database.url.expose().to_owned());
    assert_eq!(database(&[("DATABASE_URL_FILE", &url)]).as_deref(), Ok("sqlite:a.db"));
    assert_eq!(database(&[("CACHE_ASIDE__DATABASE__URL_FILE", &url)]).as_deref(), Ok("sqlite:a.db"));
    let composed = bare(&[("DB_HOST", "h"), ("DB_PASSWORD_FILE", &password)]).unwrap().unwrap();
    assert_eq!(composed.database.url.expose(), "postgres://postgres:p%40ss%0A@h:5432");
    let ttl = secret("ttl", "5\n");
    assert_eq!(under(&[("CACHE_TTL_FILE", &ttl)]).unwrap().defaults.ttl.as_secs(), 5);
    let list = secret("write", "create,delete\n");
    assert_eq!(
        under(&[("CACHE_ASIDE__RESOURCES__USERS__WRITE_FILE", &list)]).unwrap().resources["users"].write.len(),
        2
    );
    assert_eq!(
        database(&[("DATABASE_URL", "sqlite:b"), ("DATABASE_URL_FILE", &url)]),
        Err("DATABASE_URL and DATABASE_URL_FILE are both set; keep one of them".into())
    );
    assert_eq!(
        database(&[("CACHE_ASIDE__DATABASE__URL", "sqlite:b"), ("CACHE_ASIDE__DATABASE__URL_FILE", &url)]),
        Err("CACHE_ASIDE__DATABASE__URL and CACHE_ASIDE__DATABASE__URL_FILE are both set; keep one of them".into())
    );
    let missing = database(&[("DATABASE_URL_FILE", "/nowhere/url")]).unwrap_err();
    assert!(missing.starts_with("DATABASE_URL_FILE: /nowhere/url: can't be read: "), "{missing}");
    let empty = secret("empty", "\n");
    assert_eq!(
        database(&[("DATABASE_URL_FILE", &empty)]),
        Err("DATABASE_URL_FILE: database.url is missing: set it in the file or DATABASE_URL".into())
    );
}
