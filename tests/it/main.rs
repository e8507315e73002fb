//! Integration tests: one binary, because linking many costs more than it orders.

#[path = "../standin/standin.rs"]
mod standin;
mod support;

mod first;
