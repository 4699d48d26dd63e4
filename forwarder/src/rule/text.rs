//! What people may write into a rule: its name, owner and purpose.

use super::invalid::{Invalid, quoted, refuse};
use super::reference::RuleRef;

const LONGEST_NAME: usize = 64;
const LONGEST_PURPOSE: usize = 256;

/// Refuses a name that could not be typed, shown, or told from another way to name a rule.
pub fn check_name(name: &str) -> Result<(), Invalid> {
    check_text("name", name, LONGEST_NAME)?;
    if name.starts_with('-') || name == "." || name == ".." {
        refuse!("name {} cannot be typed as an argument: begin it with a letter", quoted(name));
    }
    match name.parse::<RuleRef>() {
        Ok(RuleRef::Name(_)) if name.parse::<super::Protocol>().is_err() => Ok(()),
        _ => refuse!(
            "name {} reads as an id or as PROTO EXTERNAL: begin it with a letter, as web",
            quoted(name)
        ),
    }
}

pub fn check_owner(owner: &str) -> Result<(), Invalid> {
    check_text("owner", owner, LONGEST_NAME)
}

pub fn check_purpose(purpose: &str) -> Result<(), Invalid> {
    check_text("purpose", purpose, LONGEST_PURPOSE)
}

fn check_text(field: &str, text: &str, longest: usize) -> Result<(), Invalid> {
    if text.len() > longest {
        refuse!("{field} has {} bytes: {longest} are the most", text.len());
    }
    if text.contains(changes_display) {
        refuse!("{field} {} has control characters: write plain text", quoted(text));
    }
    if text.trim() != text {
        refuse!("{field} {} begins or ends with a space: leave it out", quoted(text));
    }
    Ok(())
}

/// Control characters, and those that reorder or break the line that they stand in.
fn changes_display(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_names_are_taken() {
        for name in ["web", "web server 2", "küche", "a/b", "3rd", &"x".repeat(64)] {
            assert_eq!(check_name(name), Ok(()), "{name}");
        }
    }

    #[test]
    fn names_that_would_mislead_are_refused() {
        let long = "x".repeat(65);
        for name in [
            "12",
            "0",
            " web",
            "web ",
            "a\nb",
            "a\u{1b}[0m",
            "a\u{202e}b",
            "tcp",
            "tcp+udp",
            "udp wan:80",
            "-x",
            ".",
            "..",
            &long,
        ] {
            let error = check_name(name).unwrap_err().to_string();
            assert!(!error.chars().any(changes_display), "{error}");
        }
    }

    #[test]
    fn owner_and_purpose_are_bounded_and_printable() {
        assert!(check_owner(&"x".repeat(65)).is_err());
        assert!(check_purpose(&"x".repeat(257)).is_err());
        assert!(check_purpose("tab\there").is_err());
        assert_eq!(check_purpose("12"), Ok(()));
    }
}
