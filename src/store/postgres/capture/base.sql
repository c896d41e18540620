-- What every captured table shares: the outbox, and what bounds it. Safe to run again.
-- What somebody else may have put there must not be adopted: triggers' functions run with our rights.
DO $check$
DECLARE
  strange text;
BEGIN
  SELECT string_agg(DISTINCT x.owner::regrole::text, ', ') INTO strange FROM (
    SELECT nspowner AS owner FROM pg_namespace WHERE nspname = 'cache_aside'
    UNION SELECT relowner FROM pg_class WHERE relnamespace = to_regnamespace('cache_aside')
    UNION SELECT proowner FROM pg_proc WHERE pronamespace = to_regnamespace('cache_aside')) x
  WHERE x.owner <> current_user::regrole AND NOT (SELECT r.rolsuper FROM pg_roles r WHERE r.oid = x.owner)
    AND x.owner <> (SELECT d.datdba FROM pg_database d WHERE d.datname = current_database());
  IF strange IS NOT NULL THEN
    RAISE EXCEPTION 'the schema cache_aside, or something in it, belongs to %: let that role run migrate, or drop it', strange;
  END IF;
END
$check$;
CREATE SCHEMA IF NOT EXISTS cache_aside;
COMMENT ON SCHEMA cache_aside IS 'Change capture of cache-aside: who reads a cache learns here what changed';

-- One row, so that a service can tell what it finds.
CREATE TABLE IF NOT EXISTS cache_aside.about (
  only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
  version integer NOT NULL,
  -- What was visible in it may have been dropped from the outbox.
  horizon pg_snapshot NOT NULL,
  -- The system and database that its snapshots are of: a dump may be restored elsewhere.
  home text
);
INSERT INTO cache_aside.about (version, horizon) VALUES ({version}, '1:1:') ON CONFLICT DO NOTHING;

-- The slot that fills the outbox where triggers don't.
ALTER TABLE cache_aside.about ADD COLUMN IF NOT EXISTS slot text;

-- What origin() said last. It is in the log, so a standby that shows it follows this server, in this of its lives.
ALTER TABLE cache_aside.about ADD COLUMN IF NOT EXISTS origin text;

-- Which tables are captured, and which of their columns come along. The id differs after every installation, so that
-- nothing that was cached before a gap in the capture is used after it.
CREATE TABLE IF NOT EXISTS cache_aside.captures (
  relation text PRIMARY KEY,
  id uuid NOT NULL DEFAULT gen_random_uuid(),
  columns text[] NOT NULL
);

-- What changed: rows are only ever inserted, and dropped once they were visible in an old enough snapshot.
CREATE TABLE IF NOT EXISTS cache_aside.outbox (
  xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
  id bigint GENERATED ALWAYS AS IDENTITY,
  relation text NOT NULL,
  -- Key and list columns of a row before or after its change; NULL: anything in the table may have changed.
  image jsonb,
  at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (xid, id)
) WITH (autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 20000,
        autovacuum_vacuum_insert_scale_factor = 0.0, autovacuum_vacuum_insert_threshold = 20000);

-- Finds the row of a transaction that says it all.
CREATE INDEX IF NOT EXISTS outbox_anything ON cache_aside.outbox (xid, relation) WHERE image IS NULL;

-- Snapshots of the last minutes, the candidates for the horizon.
CREATE TABLE IF NOT EXISTS cache_aside.marks (
  at timestamptz PRIMARY KEY DEFAULT clock_timestamp(),
  snapshot pg_snapshot NOT NULL DEFAULT pg_current_snapshot()
);

-- Emptied when the server comes back from a crash, which may have taken back commits that others have seen
-- (synchronous_commit = off), and gives their ids to others.
CREATE UNLOGGED TABLE IF NOT EXISTS cache_aside.life (
  only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
  id uuid NOT NULL DEFAULT gen_random_uuid()
);

-- Which database this is, and which of its lives: system, timeline, database, life, and when the server was started, since
-- a copy of its files may have been put in place of them meanwhile. Empty on a server that only follows.
CREATE OR REPLACE FUNCTION cache_aside.origin() RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $origin$
DECLARE
  life uuid;
  system text;
  database oid;
  answer text;
BEGIN
  IF pg_is_in_recovery() THEN
    RETURN '';
  END IF;
  SELECT c.system_identifier INTO system FROM pg_control_system() c;
  SELECT d.oid INTO database FROM pg_database d WHERE d.datname = current_database();
  IF (SELECT a.home IS DISTINCT FROM system || ':' || database FROM cache_aside.about a) THEN
    UPDATE cache_aside.about SET home = system || ':' || database, horizon = pg_current_snapshot(), slot = NULL
      WHERE home IS DISTINCT FROM system || ':' || database;
    IF FOUND THEN
      DELETE FROM cache_aside.outbox;
      DELETE FROM cache_aside.marks;
      DELETE FROM cache_aside.life;
    END IF;
  END IF;
  SELECT l.id INTO life FROM cache_aside.life l;
  IF life IS NULL THEN
    INSERT INTO cache_aside.life DEFAULT VALUES ON CONFLICT DO NOTHING;
    SELECT l.id INTO life FROM cache_aside.life l;
  END IF;
  answer := system || ':' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) || ':' || database || ':' || life
    || ':' || extract(epoch FROM pg_postmaster_start_time());
  IF (SELECT a.origin IS DISTINCT FROM answer FROM cache_aside.about a) THEN
    BEGIN
      UPDATE cache_aside.about a SET origin = answer WHERE a.origin IS DISTINCT FROM answer;
    EXCEPTION WHEN read_only_sql_transaction THEN
      -- Only standbys are of less use then.
    END;
  END IF;
  RETURN answer;
END
$origin$;
REVOKE ALL ON FUNCTION cache_aside.origin() FROM PUBLIC;

-- Tells everybody who caches what a person has dropped: a cache that comes back with old data has missed it.
CREATE OR REPLACE FUNCTION cache_aside.announce(dropped jsonb) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $announce$
  INSERT INTO cache_aside.outbox (relation, image) VALUES ('', $1);
$announce$;
REVOKE ALL ON FUNCTION cache_aside.announce(jsonb) FROM PUBLIC;

-- Makes a slot the one that fills the outbox. What was known before this moment counts for nothing: changes are missing.
CREATE OR REPLACE FUNCTION cache_aside.anew(slot text) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $anew$
  UPDATE cache_aside.about SET slot = $1, horizon = pg_current_snapshot();
$anew$;
REVOKE ALL ON FUNCTION cache_aside.anew(text) FROM PUBLIC;

-- Drops what everybody who was there within ten minutes has seen; what has piled up past a million rows, sooner.
-- Answers how many rows it dropped: as many as `most` means that there may be more. Anyone may call it at any time; one at
-- a time works, the others go on.
CREATE OR REPLACE FUNCTION cache_aside.sweep(most integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $sweep$
DECLARE
  keep interval := '10 minutes';
  found pg_snapshot;
  dropped integer;
BEGIN
  IF NOT pg_try_advisory_xact_lock(hashtext('cache_aside.sweep')) THEN
    RETURN 0;
  END IF;
  IF NOT EXISTS (SELECT FROM cache_aside.marks m WHERE m.at > clock_timestamp() - interval '20 seconds') THEN
    INSERT INTO cache_aside.marks DEFAULT VALUES;
  END IF;
  IF (SELECT count(*) FROM (SELECT FROM cache_aside.outbox LIMIT 1000001) o) > 1000000 THEN
    keep := '30 seconds';
  END IF;
  SELECT m.snapshot INTO found FROM cache_aside.marks m
    WHERE m.at < clock_timestamp() - keep ORDER BY m.at DESC LIMIT 1;
  IF found IS NULL THEN
    RETURN 0;
  END IF;
  -- The horizon moves in the transaction that drops: whoever still finds a row finds the old horizon. It never moves
  -- back, whatever the clock does: a later snapshot has a higher xmax, or the same and fewer transactions under way.
  UPDATE cache_aside.about SET horizon = found
    WHERE (pg_snapshot_xmax(horizon), -(SELECT count(*) FROM pg_snapshot_xip(horizon)))
        < (pg_snapshot_xmax(found), -(SELECT count(*) FROM pg_snapshot_xip(found)));
  SELECT a.horizon INTO found FROM cache_aside.about a;
  DELETE FROM cache_aside.marks m WHERE m.at < clock_timestamp() - interval '11 minutes';
  DELETE FROM cache_aside.outbox o WHERE o.ctid = ANY (ARRAY(
    SELECT d.ctid FROM cache_aside.outbox d
    WHERE d.xid < pg_snapshot_xmax(found) AND pg_visible_in_snapshot(d.xid, found)
    ORDER BY d.xid LIMIT most));
  GET DIAGNOSTICS dropped = ROW_COUNT;
  RETURN dropped;
END
$sweep$;
REVOKE ALL ON FUNCTION cache_aside.sweep(integer) FROM PUBLIC;

UPDATE cache_aside.about SET version = {version} WHERE version < {version};
