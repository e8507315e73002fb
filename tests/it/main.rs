//! Integration tests: one binary, because linking many costs more than it orders.

#[path = "../standin/standin.rs"]
mod standin;
#[cfg(test)]
mod support;
#[cfg(test)]
mod dice;
#[cfg(test)]
#[path = "../fuzz/readings.rs"]
mod readings;
#[cfg(test)]
#[path = "../fuzz/properties.rs"]
mod properties;

#[cfg(test)]
mod audit;
#[cfg(test)]
mod bad_admin;
#[cfg(test)]
mod bad_input;
#[cfg(test)]
mod caps;
#[cfg(test)]
mod catalogue;
#[cfg(test)]
mod collector;
#[cfg(test)]
mod context;
#[cfg(test)]
mod differential;
#[cfg(test)]
mod exported;
#[cfg(test)]
mod families;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod first;
#[cfg(test)]
mod fleet;
#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod grants;
#[cfg(test)]
mod import;
#[cfg(test)]
mod kill;
#[cfg(test)]
mod ledger;
#[cfg(test)]
mod objects;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod outcomes;
#[cfg(test)]
mod own_faults;
#[cfg(test)]
mod postgres;
#[cfg(test)]
mod process;
#[cfg(test)]
mod raw;
#[cfg(test)]
mod reads;
#[cfg(test)]
mod recovery;
#[cfg(test)]
mod same_call;
#[cfg(test)]
mod secrets;
#[cfg(test)]
mod tidy;
#[cfg(test)]
mod timing;
#[cfg(test)]
mod traps;
