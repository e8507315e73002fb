//! The program: arguments in, exit code out. Everything else is in the library.

use std::process::ExitCode;

/// A request makes some four hundred small allocations, and the C library of the static image is slow at them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    keybrake::cli::main()
}
