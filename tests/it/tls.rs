//! Encrypted connections to both backends, and what is verified.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use crate::app::App;
use crate::invalidation::{seen, warm};
use crate::servers::{Mariadb, Postgres, Redis};

pub fn openssl(dir: &Path, args: &str) {
    let output = Command::new("openssl").args(args.split(' ')).current_dir(dir).output().expect("openssl is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A certificate authority and a certificate of it for this machine.
pub fn certificates() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder can be made");
    let path = dir.path();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    openssl(path, &format!("req -x509 {key} -keyout ca.key -out ca.crt -days 2 -subj /CN=test-ca"));
    openssl(path, &format!("req -x509 {key} -keyout other.key -out other.crt -days 2 -subj /CN=other-ca"));
    openssl(
        path,
        &format!("req {key} -keyout server.key -out server.csr -subj /CN=x -addext subjectAltName=IP:127.0.0.1"),
    );
    openssl(
        path,
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out server.crt -days 2 -copy_extensions copy",
    );
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("it is ours");
    std::fs::set_permissions(path.join("server.key"), std::fs::Permissions::from_mode(0o600)).expect("it is ours");
    // PostgreSQL takes a key only from its own user, and never runs as root.
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let postgres =
        passwd.lines().find(|line| line.starts_with("postgres:")).and_then(|line| line.split(':').nth(2)?.parse().ok());
    if let Some(uid) = postgres {
        // It fails where the tests don't run as root, and then isn't needed.
        let _ = chown(path.join("server.key"), Some(uid), None);
    }
    dir
}

#[tokio::test]
async fn both_backends_are_reached_over_tls_and_strangers_are_refused() {
    let dir = certificates();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let (certificate, key) = (file("server.crt"), file("server.key"));
    let settings = ["ssl=on".to_owned(), format!("ssl_cert_file={certificate}"), format!("ssl_key_file={key}")];
    let postgres = Postgres::start_with(&settings.each_ref().map(String::as_str)).await;
    let database = postgres.create_database().await;
    database
        .client()
        .await
        .batch_execute("CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item VALUES (1);")
        .await
        .expect("it is sound");
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|socket| socket.local_addr())
        .expect("a port is free")
        .port();
    let ca = file("ca.crt");
    let args = [
        "--tls-port",
        &port.to_string(),
        "--tls-cert-file",
        &certificate,
        "--tls-key-file",
        &key,
        "--tls-ca-cert-file",
        &ca,
        "--tls-auth-clients",
        "no",
    ];
    let _redis = Redis::start_with(&args).await;
    let config = |mode: &str, ca: &str| {
        let ca_file = if ca.is_empty() { String::new() } else { format!(", ca_file: \"{}\"", file(ca)) };
        format!(
            "database: {{ url: \"{}?sslmode={mode}\"{ca_file} }}\ncache: {{ url: \"rediss://127.0.0.1:{port}\", ca_file: \"{}\" }}\n\
             invalidation: {{ mode: none }}\nresources: {{ item: {{}} }}\n",
            database.url,
            file("ca.crt")
        )
    };
    for (mode, ca) in
        [("require", ""), ("prefer", ""), ("require", "ca.crt"), ("verify-ca", "ca.crt"), ("verify-full", "ca.crt")]
    {
        let app = App::start(&config(mode, ca)).await;
        app.until("cached", async |app| app.get("/api/item/1").await.expect(200).source() == "cache").await;
        let encrypted = "SELECT bool_or(s.ssl) FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid) WHERE a.application_name = 'cache-aside'";
        let row = database.client().await.query_one(encrypted, &[]).await.expect("it answers");
        assert!(row.get::<_, bool>(0), "{mode}");
    }
    for (mode, ca) in
        [("verify-full", "other.crt"), ("verify-full", ""), ("verify-ca", "other.crt"), ("require", "other.crt")]
    {
        let app = App::launch(&config(mode, ca)).await;
        app.until("refused", async |app| {
            app.get("/readyz?verbose").await.text.contains("[-] database: the database can't be reached")
        })
        .await;
    }
}

#[tokio::test]
async fn mariadb_is_reached_over_tls_and_strangers_are_refused() {
    let dir = certificates();
    let file = |name: &str| dir.path().join(name).display().to_string();
    // MariaDB takes a key from anybody, as long as it can read it.
    std::fs::copy(file("server.key"), file("open.key")).expect("it is ours");
    std::fs::set_permissions(file("open.key"), std::fs::Permissions::from_mode(0o644)).expect("it is ours");
    let settings = [
        format!("--ssl-ca={}", file("ca.crt")),
        format!("--ssl-cert={}", file("server.crt")),
        format!("--ssl-key={}", file("open.key")),
    ];
    let server = Mariadb::start_with(&settings.each_ref().map(String::as_str)).await;
    let database = server.create_database().await;
    let strict =
        "CREATE USER strict@'127.0.0.1' IDENTIFIED BY 'se:cret?' REQUIRE SSL; GRANT ALL ON *.* TO strict@'127.0.0.1'";
    database.sql(&format!("CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item VALUES (1); {strict}")).await;
    let config = |mode: &str, ca: &str| {
        let ca_file = if ca.is_empty() { String::new() } else { format!(", ca_file: \"{}\"", file(ca)) };
        let url = database.url.replace("tester@", "strict:se%3Acret%3F@");
        format!(
            "database: {{ url: \"{url}{mode}\"{ca_file} }}\ncache: {{ url: \"memory:\" }}\n\
             invalidation: {{ mode: none }}\nresources: {{ item: {{}} }}\n"
        )
    };
    for (mode, ca) in [
        ("?ssl-mode=REQUIRED", ""),
        ("?sslmode=require", "ca.crt"),
        ("?ssl-mode=VERIFY_CA", "ca.crt"),
        ("?ssl_mode=verify_identity&tcp_nodelay=true", "ca.crt"),
    ] {
        let app = App::start(&config(mode, ca)).await;
        app.get("/api/item/1").await.expect(200);
    }
    for (mode, ca) in [
        ("", ""),
        ("?ssl-mode=DISABLED", "ca.crt"),
        ("?ssl-mode=VERIFY_CA", ""),
        ("?ssl-mode=VERIFY_IDENTITY", "other.crt"),
        ("?ssl-mode=REQUIRED", "other.crt"),
    ] {
        let app = App::launch(&config(mode, ca)).await;
        app.until("refused", async |app| app.get("/readyz?verbose").await.text.contains("[-] database: the database "))
            .await;
        assert!(!app.log().contains("se:cret"));
    }
}

#[tokio::test]
async fn the_log_is_decoded_with_any_kind_of_password_and_over_tls() {
    let dir = certificates();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let hba = "host all postgres 127.0.0.1/32 trust\nhost all scrambled 127.0.0.1/32 scram-sha-256\n\
               host all hashed 127.0.0.1/32 md5\nhostssl all plain 127.0.0.1/32 password\n";
    std::fs::write(file("hba.conf"), hba).expect("it is ours");
    let settings = [
        "ssl=on".to_owned(),
        format!("ssl_cert_file={}", file("server.crt")),
        format!("ssl_key_file={}", file("server.key")),
        format!("hba_file={}", file("hba.conf")),
    ];
    let postgres = Postgres::start_with(&settings.each_ref().map(String::as_str)).await;
    let database = postgres.create_database().await;
    let redis = Redis::start().await;
    let client = database.client().await;
    let roles =
        [("scrambled", "scram-sha-256", "disable"), ("hashed", "md5", "prefer"), ("plain", "md5", "verify-full")];
    client
        .batch_execute("CREATE TABLE item (id int PRIMARY KEY, v int); INSERT INTO item VALUES (1, 0)")
        .await
        .expect("sound");
    for (v, (role, stored, mode)) in (1..).zip(roles) {
        let make =
            format!("SET password_encryption = '{stored}'; CREATE ROLE {role} LOGIN SUPERUSER PASSWORD 'se:cret?'; ");
        client.batch_execute(&make).await.expect("a superuser may");
        let url = database.url.replace("postgres://postgres@", &format!("postgres://{role}:se%3Acret%3F@"));
        assert_ne!(url, database.url);
        let config = format!(
            "database: {{ url: \"{url}?sslmode={mode}\", ca_file: \"{}\" }}\ncache: {{ url: \"{}\" }}\n\
             invalidation: {{ mode: wal }}\nresources: {{ item: {{}} }}\n",
            file("ca.crt"),
            redis.url()
        );
        let mut app = App::start(&config).await;
        warm(&[&app], &["/api/item/1"]).await;
        client.batch_execute(&format!("UPDATE item SET v = {v}")).await.expect("it is sound");
        seen(&[&app], "/api/item/1", &format!(r#""v":{v}"#)).await;
        let encrypted = format!(
            "SELECT s.ssl FROM pg_stat_replication r JOIN pg_stat_ssl s USING (pid) WHERE r.usename = '{role}'"
        );
        let row = client.query_one(&encrypted, &[]).await.expect("it decodes");
        assert_eq!(row.get::<_, bool>(0), mode != "disable", "{role}");
        app.signal("KILL");
        app.ended().await;
        // A wrong password is told apart from a server that is away.
        let wrong = App::launch(&config.replace("se%3Acret", "wrong")).await;
        wrong.until("refused", async |app| app.log().contains("password authentication failed")).await;
    }
}
