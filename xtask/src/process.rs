//! Running other programs so that whoever watches always sees that something goes on.

use std::{
    ffi::OsStr,
    io::{self, BufRead as _, BufReader, IsTerminal as _, PipeReader, Write as _},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// How long a program may be silent on a terminal before we say that it is still at work.
const SILENCE: Duration = Duration::from_secs(2);

/// The same where nobody watches live, so that logs stay readable.
const SILENCE_IN_LOGS: Duration = Duration::from_secs(15);

/// How long we go on reading from a program that has ended: longer only waits for something that
/// it left behind with its output still open.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Says what is about to be done.
pub fn announce(what: &str) {
    println!("==> {what}");
}

/// Runs a program to its end, shows its output as it comes, and fails if it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = show(command);
    let status = if io::stderr().is_terminal() && has_progress_bar(command) {
        command.status().with_context(|| format!("cannot run `{shown}`"))?
    } else {
        run_watched(command, &shown, None)?
    };
    if !status.success() {
        bail!("`{shown}` failed ({status})");
    }
    Ok(())
}

/// Runs a program to its end; shows its output only where it fails, and fails then.
pub fn run_quietly(command: &mut Command) -> Result<()> {
    let shown = show(command);
    let mut hidden = Vec::new();
    let status = run_watched(command, &shown, Some(&mut hidden))?;
    if !status.success() {
        io::stdout().write_all(&hidden).context("cannot write to stdout")?;
        bail!("`{shown}` failed ({status})");
    }
    Ok(())
}

/// Runs a program to its end and returns what it printed on stdout.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run `{shown}`"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("`{shown}` failed ({}): {}", output.status, complaint.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{shown}` printed no text"))
}

/// The command as one could type it; what it gets by its environment is left out.
pub fn show(command: &Command) -> String {
    let program = command.get_program();
    let name = std::path::Path::new(program).file_name().unwrap_or(program);
    let words: Vec<_> = [name].into_iter().chain(command.get_args()).map(OsStr::to_string_lossy).collect();
    words.join(" ")
}

/// On a terminal cargo shows its own progress, which a pipe would take away.
fn has_progress_bar(command: &Command) -> bool {
    std::path::Path::new(command.get_program()).file_stem() == Some(OsStr::new("cargo"))
}

/// Prints the output as it comes, or else keeps it in `hidden`.
fn run_watched(command: &mut Command, shown: &str, hidden: Option<&mut Vec<u8>>) -> Result<ExitStatus> {
    let (reader, writer) = io::pipe().context("cannot make a pipe")?;
    let errors = writer.try_clone().context("cannot copy a pipe")?;
    let child = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(errors)
        .spawn()
        .with_context(|| format!("cannot run `{shown}`"));
    // The command holds our copies of the writing end; the reader ends once they are closed.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    relay(child?, read_lines(reader), shown, hidden)
}

fn read_lines(reader: PipeReader) -> Receiver<Vec<u8>> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        // An error ends the reading like an end of the output: the exit status tells the rest.
        while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            if sender.send(std::mem::take(&mut line)).is_err() {
                break;
            }
        }
    });
    lines
}

/// Prints the lines as they come and, when none comes for a while, that the child is still at it.
fn relay(
    mut child: Child,
    lines: Receiver<Vec<u8>>,
    shown: &str,
    mut hidden: Option<&mut Vec<u8>>,
) -> Result<ExitStatus> {
    let started = Instant::now();
    let terminal = io::stdout().is_terminal();
    let patience = if terminal { SILENCE } else { SILENCE_IN_LOGS };
    let mut last_line = Instant::now();
    let mut ended: Option<(ExitStatus, Instant)> = None;
    let mut stdout = io::stdout();
    loop {
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => match &mut hidden {
                Some(hidden) => hidden.extend(line),
                None => {
                    last_line = Instant::now();
                    stdout.write_all(&line).context("cannot write to stdout")?;
                }
            },
            Err(RecvTimeoutError::Disconnected) => {
                return child.wait().with_context(|| format!("cannot wait for `{shown}`"));
            }
            Err(RecvTimeoutError::Timeout) => {
                if let Some((status, at)) = ended
                    && at.elapsed() > LAST_WORDS
                {
                    return Ok(status);
                }
                if ended.is_none() {
                    ended = child.try_wait()?.map(|status| (status, Instant::now()));
                }
                if last_line.elapsed() >= patience {
                    last_line = Instant::now();
                    still_at_it(&mut stdout, terminal, shown, started.elapsed())?;
                }
            }
        }
    }
}

fn still_at_it(stdout: &mut io::Stdout, terminal: bool, shown: &str, elapsed: Duration) -> Result<()> {
    let program = shown.split(' ').take(2).collect::<Vec<_>>().join(" ");
    // On a terminal the next line overwrites this one.
    let end = if terminal { '\r' } else { '\n' };
    write!(stdout, "    … {program} is at work, {} s{end}", elapsed.as_secs())
        .and_then(|()| stdout.flush())
        .context("cannot write to stdout")
}
