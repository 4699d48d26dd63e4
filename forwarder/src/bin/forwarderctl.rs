//! The operator's command.

use std::io::{Write, stderr};
use std::process::ExitCode;

use forwarder::ctl::args::Cli;
use forwarder::ctl::{Failure, Terminal, run};

fn main() -> ExitCode {
    let cli = Cli::read();
    match work(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Without a stderr the exit code has to do.
            let _ = writeln!(stderr(), "forwarderctl: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn work(cli: &Cli) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Refused(format!("cannot start: {error}")))?;
    runtime.block_on(run(cli, Terminal::of_stdout()))?.print()
}
