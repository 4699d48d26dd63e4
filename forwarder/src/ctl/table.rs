//! Tables: on a terminal coloured and as wide as it is, in a pipe plain and whole.

use std::io::IsTerminal;

use comfy_table::{Attribute, Cell, CellAlignment, Color, ContentArrangement, Table};

/// What stdout leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terminal {
    /// Absent in a pipe.
    pub width: Option<u16>,
    pub colour: bool,
}

impl Terminal {
    pub fn of_stdout() -> Self {
        if !std::io::stdout().is_terminal() {
            return Terminal::default();
        }
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let plain = set("NO_COLOR").is_some() || set("TERM").is_some_and(|term| term == "dumb");
        Terminal { width: Table::new().width(), colour: !plain }
    }
}

/// How a column stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

/// One field of a table.
pub struct Field {
    text: String,
    colour: Option<Color>,
}

impl Field {
    pub fn coloured(text: impl ToString, colour: Color) -> Self {
        Field { text: text.to_string(), colour: Some(colour) }
    }
}

impl<T: ToString> From<T> for Field {
    fn from(text: T) -> Self {
        Field { text: text.to_string(), colour: None }
    }
}

/// Lays `rows` out under `header`, which is left out where all titles are empty.
pub fn render(header: &[(&str, Align)], rows: Vec<Vec<Field>>, terminal: Terminal) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    match terminal.width {
        Some(width) => table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width),
        None => table.set_content_arrangement(ContentArrangement::Disabled),
    };
    if terminal.colour {
        table.enforce_styling();
    } else {
        table.force_no_tty();
    }
    if header.iter().any(|(title, _)| !title.is_empty()) {
        table.set_header(header.iter().map(|(title, _)| Cell::new(title).add_attribute(Attribute::Bold)));
    }
    for row in rows {
        table.add_row(row.into_iter().map(|field| match field.colour {
            Some(colour) => Cell::new(field.text).fg(colour),
            None => Cell::new(field.text),
        }));
    }
    for (column, (_, align)) in table.column_iter_mut().zip(header) {
        column.set_padding((0, 2));
        if *align == Align::Right {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(terminal: Terminal) -> String {
        let long = "a word and another word ".repeat(10);
        let rows = vec![vec![1.into(), Field::coloured("active", Color::Green), long.trim().into()]];
        render(&[("ID", Align::Right), ("STATE", Align::Left), ("WHY", Align::Left)], rows, terminal)
    }

    #[test]
    fn in_a_pipe_there_is_no_colour_and_nothing_is_wrapped() {
        let text = sample(Terminal::default());
        assert!(!text.contains('\u{1b}'));
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.lines().all(|line| line.trim_end() == line));
    }

    #[test]
    fn on_a_terminal_it_fits_and_has_colour() {
        let plain = sample(Terminal { width: Some(60), colour: false });
        assert!(plain.lines().count() > 2 && plain.lines().all(|line| line.len() <= 60), "{plain}");
        assert!(sample(Terminal { width: Some(60), colour: true }).contains('\u{1b}'));
    }
}
