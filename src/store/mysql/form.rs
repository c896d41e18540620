//! How values of a column are written: what its type says, as it was declared or as a result tells.

use mysql_async::consts::{ColumnFlags, ColumnType};

use crate::catalog::{Column, Kind};

/// The character set of what is no text.
const BINARY: u16 = 63;

/// How values of a column are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Integer,
    /// `tinyint(1)`, which clients of MySQL have always taken for a boolean.
    Boolean,
    /// That many bits.
    Bits(u32),
    Decimal,
    Float,
    Double,
    Date,
    /// Without a time zone.
    DateTime,
    /// A moment, in UTC here.
    Timestamp,
    Time,
    Json,
    Bytes,
    Text,
}

impl Form {
    /// Of a table's column, as it was declared.
    pub(super) fn of(column: &Column) -> Self {
        if column.json {
            return Self::Json;
        }
        let declared = column.type_name.as_str();
        let name = declared.split(['(', ' ']).next().unwrap_or(declared);
        match name {
            "tinyint" if column.kind == Kind::Boolean => Self::Boolean,
            "tinyint" | "smallint" | "mediumint" | "int" | "bigint" | "year" => Self::Integer,
            "bit" => Self::Bits(arguments(declared).first().copied().unwrap_or(1)),
            "decimal" => Self::Decimal,
            "float" => Self::Float,
            "double" => Self::Double,
            "date" => Self::Date,
            "datetime" => Self::DateTime,
            "timestamp" => Self::Timestamp,
            "time" => Self::Time,
            _ if column.kind == Kind::Bytes => Self::Bytes,
            _ => Self::Text,
        }
    }

    /// Of a statement's result.
    pub(super) fn of_result(column: &mysql_async::Column) -> Self {
        match column.column_type() {
            ColumnType::MYSQL_TYPE_TINY
                if column.column_length() == 1 && !column.flags().contains(ColumnFlags::UNSIGNED_FLAG) =>
            {
                Self::Boolean
            }
            ColumnType::MYSQL_TYPE_TINY
            | ColumnType::MYSQL_TYPE_SHORT
            | ColumnType::MYSQL_TYPE_INT24
            | ColumnType::MYSQL_TYPE_LONG
            | ColumnType::MYSQL_TYPE_LONGLONG
            | ColumnType::MYSQL_TYPE_YEAR => Self::Integer,
            ColumnType::MYSQL_TYPE_BIT => Self::Bits(column.column_length()),
            ColumnType::MYSQL_TYPE_DECIMAL | ColumnType::MYSQL_TYPE_NEWDECIMAL => Self::Decimal,
            ColumnType::MYSQL_TYPE_FLOAT => Self::Float,
            ColumnType::MYSQL_TYPE_DOUBLE => Self::Double,
            ColumnType::MYSQL_TYPE_DATE | ColumnType::MYSQL_TYPE_NEWDATE => Self::Date,
            ColumnType::MYSQL_TYPE_DATETIME | ColumnType::MYSQL_TYPE_DATETIME2 => Self::DateTime,
            ColumnType::MYSQL_TYPE_TIMESTAMP | ColumnType::MYSQL_TYPE_TIMESTAMP2 => Self::Timestamp,
            ColumnType::MYSQL_TYPE_TIME | ColumnType::MYSQL_TYPE_TIME2 => Self::Time,
            ColumnType::MYSQL_TYPE_JSON => Self::Json,
            _ if column.character_set() == BINARY => Self::Bytes,
            _ => Self::Text,
        }
    }
}

/// The numbers in a type's parentheses.
fn arguments(declared: &str) -> Vec<u32> {
    let inner = declared.split_once('(').and_then(|(_, rest)| rest.split_once(')')).map_or("", |(inner, _)| inner);
    inner.split(',').filter_map(|number| number.trim().parse().ok()).collect()
}

/// Precision and scale of a decimal column.
pub(super) fn scale(column: &Column) -> (u32, u32) {
    match arguments(&column.type_name).as_slice() {
        [precision, scale] => (*precision, *scale),
        [precision] => (*precision, 0),
        _ => (10, 0),
    }
}

/// The labels of `enum('a','b''c')` or `set(…)`.
pub(super) fn labels(declared: &str) -> Vec<String> {
    let (mut labels, mut label, mut inside) = (Vec::new(), String::new(), false);
    let mut letters = declared.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '\'' if inside && letters.peek() == Some(&'\'') => {
                letters.next();
                label.push('\'');
            }
            '\'' if inside => {
                labels.push(std::mem::take(&mut label));
                inside = false;
            }
            '\'' => inside = true,
            other if inside => label.push(other),
            _ => {}
        }
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::labels;

    #[test]
    fn labels_are_taken_out_of_their_declaration() {
        assert_eq!(labels("enum('a','b''c','','d,e')"), ["a", "b'c", "", "d,e"]);
    }
}
