//! Integration tests: one binary, because linking many costs more than it orders.

#[path = "../standin/standin.rs"]
mod standin;
#[cfg(test)]
mod support;

mod first;
mod grants;
