//! What is served: resources and their lists, checked once against the database's own schema.
//!
//! A request's path becomes a [`Target`] here or it is refused here, and this is the only room that
//! spells a cache key. The catalog knows no SQL and no Redis: stores describe tables to it
//! ([`Table`]), and it decides whether the configuration fits them ([`bind()`]).

mod bind;
mod key;
mod mapping;
mod names;
mod query;
mod resource;
mod served;
mod table;
mod target;

pub use bind::{Problem, bind, discover};
pub use key::{Key, KeyError};
pub use mapping::{Effect, Image, Mapping};
pub use names::{TableName, identifier};
pub use query::{Param, Parameters};
pub use resource::{Capture, List, Order, Policy, Resource, Statements};
pub use served::{Catalog, State, called};
pub use table::{Column, Kind, Table};
pub use target::{Target, What};
