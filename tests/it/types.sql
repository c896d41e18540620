-- One column of every type that somebody may have, under names that somebody may have chosen.
CREATE EXTENSION IF NOT EXISTS citext;
CREATE TYPE mood AS ENUM ('happy', 'sad', 'so-so');
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE DOMAIN positive_again AS positive;
CREATE TYPE pair AS (a int, b text);
CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE SCHEMA "My Schema";
CREATE TABLE "My Schema"."Täble" (
  "Id" bigint PRIMARY KEY, t text, r text, vc varchar(10), c char(5), ci citext, collated text COLLATE loose,
  n numeric, n2 numeric(20, 5), f4 real, f8 double precision, i2 smallint, i4 int, b boolean, u uuid,
  ts timestamp, tstz timestamptz, d date, tm time, tmtz timetz, iv interval, bytes bytea,
  arr int[], arr2 text[][], m mood, moods mood[], dom positive, dom2 positive_again, j json, jb jsonb,
  ir int4range, mr int4multirange, tr tstzrange, inet inet, cidr cidr, mac macaddr, pt point, ln box,
  bits bit(4), vb varbit, x xml, money money, o oid, p pair, tsv tsvector, "select" text, "quo""te" text,
  ch "char", nm name, made int GENERATED ALWAYS AS (i4 * 2) STORED);
INSERT INTO "My Schema"."Täble" ("Id") VALUES (1);
INSERT INTO "My Schema"."Täble" VALUES (9223372036854775807, E'tëxt "q" \\ \n\t nl 🦀', 'r', 'varchar', 'ch', 'CiText',
  'Coll', '123456789012345678901234567890.123456789012345678901234567890', 1.5, 1.1, 0.1::float8 + 0.2::float8,
  -32768, 21, true, 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11', '2024-02-29 12:34:56.789012',
  '2024-02-29 12:34:56.789012+02', '2024-02-29', '12:00:01.5', '12:00:01+05', '1 year 2 mons 3 days 04:05:06.7',
  '\xdeadbeef', '{1,2,NULL}', '{{a,"b c"},{NULL,"d"}}', 'so-so', '{happy,sad}', 5, 6,
  '{"a" : 1.10, "a":2, "big":12345678901234567890123}', '{"b":[1,2,{"c":null}]}', '[1,5)', '{[1,2),[5,7)}',
  '[2024-01-01 00:00:00+00,2024-02-01 00:00:00+00)', '192.168.0.1/24', '10.0.0.0/8', '08:00:2b:01:02:03', '(1,2)',
  '((1,1),(0,0))', '1010', '101', '<a>b</a>', '12.34', 4294967295, '(1,"x y")', 'fat cat', 'sel', 'q', 'c', 'nm');
INSERT INTO "My Schema"."Täble" ("Id", n, f4, f8, d, ts, tstz, n2, jb)
VALUES (-5, 'NaN', 'Infinity', '-Infinity', 'infinity', '-infinity', 'infinity', 0.00001, 'null'),
       (7, 1e-20, 1e-30, 'NaN', '0044-03-15 BC', '0001-01-01', '10000-01-01', 0, '"s"'),
       (-9223372036854775808, 'Infinity', -0.0, 1e300, '9999-12-31', '294276-12-31', '0001-01-01 BC', -1, '[]');
