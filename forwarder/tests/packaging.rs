//! The files that are installed with the programs: what they say has to hold.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use forwarder::config::{Config, Flags};

/// The example works as it is, and what it shows commented out are the defaults.
#[test]
fn the_configuration_file_shows_the_defaults() -> Result<()> {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/forwarder.toml");
    let directory = tempfile::tempdir()?;
    let spelled_out = directory.path().join("forwarder.toml");
    let (text, count) = uncommented(&fs::read_to_string(&example)?);
    ensure!(count > 0, "nothing is commented out");
    fs::write(&spelled_out, text)?;

    let load = |file: &Path| {
        let flags = Flags { config: Some(file.to_owned()), ..Flags::default() };
        Config::load(&flags).with_context(|| format!("{}", file.display()))
    };
    assert_eq!(load(&example)?, load(&spelled_out)?);
    assert_eq!(Config::check_file(&spelled_out)?, [""; 0]);
    Ok(())
}

/// Settings are commented out as `#key = …`, without the blank that begins a remark.
fn uncommented(text: &str) -> (String, usize) {
    let mut count = 0;
    let lines = text.lines().map(|line| match line.strip_prefix('#') {
        Some(setting) if !setting.starts_with(' ') => {
            count += 1;
            setting
        }
        _ => line,
    });
    (lines.collect::<Vec<_>>().join("\n"), count)
}
