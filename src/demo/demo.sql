CREATE TABLE fruit (
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  quantity INTEGER NOT NULL DEFAULT 0 CHECK (quantity >= 0)
);
INSERT INTO fruit (id, name, quantity) VALUES (1, 'apple', 100), (2, 'orange', 200), (3, 'pear', 300);

CREATE TABLE users (
  id TEXT PRIMARY KEY NOT NULL,
  name TEXT NOT NULL,
  email TEXT UNIQUE
);
INSERT INTO users (id, name, email) VALUES
  ('01KB584F3Y9AF31621Q7N62Q67', 'Angelica Hill', 'angelica@example.com'),
  ('01KB584F3Y9AF31621Q7N62Q68', 'Tobias Kern', NULL);

CREATE TABLE categories (
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE
);
INSERT INTO categories (id, name) VALUES (1, 'Fruit'), (2, 'Vegetables'), (3, 'Bakery'), (4, 'Dairy'), (5, 'Drinks');

CREATE TABLE products (
  id INTEGER PRIMARY KEY,
  category_id INTEGER NOT NULL REFERENCES categories (id),
  name TEXT NOT NULL,
  price DECIMAL(10, 2) NOT NULL,
  attributes JSON
);
CREATE INDEX products_category_id ON products (category_id);
INSERT INTO products (id, category_id, name, price, attributes) VALUES
  (1, 1, 'Apple', 0.35, '{"origin":"Tyrol","organic":true}'),
  (2, 1, 'Orange', 0.6, '{"origin":"Valencia"}'),
  (3, 2, 'Carrot', 0.2, NULL),
  (4, 3, 'Rye bread', 3.9, '{"weight_g":750}'),
  (5, 4, 'Oat milk', 1.95, '{"litres":1}'),
  (6, 5, 'Apple juice', 2.4, '{"litres":1}'),
  (7, 5, 'Espresso beans', 12.5, '{"weight_g":500}'),
  (8, 5, 'Green tea', 4.2, NULL);

CREATE TABLE sessions (
  id TEXT PRIMARY KEY NOT NULL,
  user_id TEXT NOT NULL REFERENCES users (id),
  data JSON,
  expires_at TIMESTAMP NOT NULL
);
INSERT INTO sessions (id, user_id, data, expires_at) VALUES
  ('s-1', '01KB584F3Y9AF31621Q7N62Q67', '{"cart":[1,4]}', '2030-01-01 00:00:00');

CREATE TABLE airline (
  airline_id INTEGER PRIMARY KEY,
  iata TEXT NOT NULL UNIQUE,
  name TEXT NOT NULL
);
INSERT INTO airline (airline_id, iata, name) VALUES
  (1, 'LH', 'Lufthansa'), (2, 'AF', 'Air France'), (3, 'KL', 'KLM'), (4, 'IB', 'Iberia'), (5, 'OS', 'Austrian');

CREATE TABLE airport (
  airport_id INTEGER PRIMARY KEY,
  iata TEXT NOT NULL UNIQUE,
  name TEXT NOT NULL
);
INSERT INTO airport (airport_id, iata, name) VALUES
  (1, 'FRA', 'Frankfurt'), (2, 'CDG', 'Paris Charles de Gaulle'), (3, 'AMS', 'Amsterdam Schiphol'), (4, 'MAD', 'Madrid Barajas');

CREATE TABLE flight (
  flight_id INTEGER PRIMARY KEY,
  flightno TEXT NOT NULL,
  airline_id INTEGER NOT NULL REFERENCES airline (airline_id),
  from_airport INTEGER NOT NULL REFERENCES airport (airport_id),
  to_airport INTEGER NOT NULL REFERENCES airport (airport_id),
  departure TIMESTAMP NOT NULL
);
INSERT INTO flight (flight_id, flightno, airline_id, from_airport, to_airport, departure) VALUES
  (1, 'LH1034', 1, 1, 2, '2026-07-01 08:10:00'), (2, 'LH986', 1, 1, 3, '2026-07-01 09:25:00'),
  (3, 'AF1018', 2, 2, 1, '2026-07-01 10:00:00'), (4, 'AF1240', 2, 2, 3, '2026-07-01 11:40:00'),
  (5, 'KL1765', 3, 3, 1, '2026-07-01 12:05:00'), (6, 'IB8740', 4, 4, 2, '2026-07-01 13:30:00'),
  (7, 'OS130', 5, 1, 4, '2026-07-01 15:45:00'), (8, 'LH1122', 1, 1, 4, '2026-07-01 17:20:00');

CREATE TABLE booking (
  booking_id INTEGER PRIMARY KEY,
  flight_id INTEGER NOT NULL REFERENCES flight (flight_id),
  seat TEXT NOT NULL,
  price DECIMAL(10, 2) NOT NULL
);
CREATE INDEX booking_flight_id ON booking (flight_id);
INSERT INTO booking (booking_id, flight_id, seat, price) VALUES
  (1, 1, '12A', 129.5), (2, 1, '12B', 149.0), (3, 2, '3C', 310.0), (4, 3, '22F', 99.9), (5, 4, '7A', 120.0), (6, 4, '7B', 120.0),
  (7, 5, '15D', 88.0), (8, 6, '1A', 540.0), (9, 7, '9E', 175.25), (10, 8, '18C', 189.0), (11, 8, '18D', 189.0), (12, 8, '2A', 620.0);
