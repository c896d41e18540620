//! A walk through all keys of a resource, page by page: no snapshot is kept open, and no connection is held in between.
//!
//! A row that is there from the beginning to the end of the walk is met; of one that comes or goes meanwhile nothing is
//! promised.

use super::{Page, Store, StoreError};
use crate::catalog::{Key, Resource};

/// Where a walk is.
#[derive(Debug)]
pub struct Keys {
    after: Option<Key>,
    page: usize,
    /// A key that was passed, and after how many pages the next one is remembered.
    passed: Option<Key>,
    pages: u64,
}

impl Keys {
    /// Before the first key; pages of so many keys, at least one.
    #[must_use]
    pub fn new(page: usize) -> Self {
        Self { after: None, page: page.max(1), passed: None, pages: 0 }
    }

    /// The keys of the next page, each once; an empty one is the end. After an error the same page can be asked for again.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; also where the walk comes by a key that it has passed, because the database can't find the place of
    /// one of its own keys again (a float that was rounded, text that is no UTF-8).
    pub async fn next<S: Store>(&mut self, store: &S, resource: &Resource) -> Result<Page, StoreError> {
        let mut page = store.keys(resource, self.after.as_ref(), self.page).await?;
        page.keys.dedup();
        let Some(last) = page.keys.last() else { return Ok(page) };
        // Remembering one key after 1, 2, 4, 8… pages finds any circle (R. P. Brent, "An improved Monte Carlo factorization
        // algorithm", 1980).
        if self.passed.as_ref() == Some(last) {
            return Err(StoreError::Refused("a walk through the keys does not end: their order is not stable".into()));
        }
        self.pages += 1;
        if self.pages.is_power_of_two() {
            self.passed = Some(last.clone());
        }
        self.after = Some(last.clone());
        Ok(page)
    }
}
