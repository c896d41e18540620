-- What every captured table shares: the outbox, and what bounds it. Safe to run again.
CREATE DATABASE IF NOT EXISTS cache_aside CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;

-- One row, so that a service can tell what it finds. What the horizon shows may have been dropped from the outbox, in
-- that life of the server.
CREATE TABLE IF NOT EXISTS cache_aside.about (
  only_row TINYINT NOT NULL PRIMARY KEY,
  version INT NOT NULL,
  origin VARCHAR(1000) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
  horizon LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL
) ENGINE = InnoDB;

INSERT IGNORE INTO cache_aside.about (only_row, version, origin, horizon) VALUES (1, {version}, '', '');

-- Which tables are captured, and which of their columns come along. The id differs after every installation, so that
-- nothing that was cached before a gap in the capture is used after it.
CREATE TABLE IF NOT EXISTS cache_aside.captures (
  relation VARCHAR(400) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL PRIMARY KEY,
  id VARCHAR(36) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
  columns LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL
) ENGINE = InnoDB;

-- What changed: rows are only ever inserted, and dropped once everybody has had time to see them. Without an image,
-- anything in the table may have changed. The word in tx is that of the writing transaction, where it has one.
CREATE TABLE IF NOT EXISTS cache_aside.outbox (
  id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
  tx VARBINARY(32) NULL,
  relation VARCHAR(400) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
  image LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NULL,
  at TIMESTAMP(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6)
) ENGINE = InnoDB;

-- How far one could see in the last minutes, the candidates for the horizon.
CREATE TABLE IF NOT EXISTS cache_aside.points (
  id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
  at TIMESTAMP(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6),
  origin VARCHAR(1000) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
  point LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL
) ENGINE = InnoDB;

-- Emptied by a restart, after which commits may be missing that others have seen.
CREATE TABLE IF NOT EXISTS cache_aside.life (
  only_row TINYINT NOT NULL PRIMARY KEY,
  id VARCHAR(36) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL
) ENGINE = MEMORY;

-- What a service must know of one database and may not see by itself: the triggers, and the keys whose cascades fire
-- none.
DROP PROCEDURE IF EXISTS cache_aside.installed;

CREATE PROCEDURE cache_aside.installed(IN place VARCHAR(64) CHARACTER SET utf8mb3) READS SQL DATA SQL SECURITY DEFINER
BEGIN
  {triggers} AND t.TRIGGER_SCHEMA = place;
  {cascades} AND r.CONSTRAINT_SCHEMA = place AND k.CONSTRAINT_SCHEMA = place AND k.TABLE_SCHEMA = place;
END;

UPDATE cache_aside.about SET version = {version} WHERE version < {version};
