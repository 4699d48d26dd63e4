//! Tables: on a terminal coloured and as wide as it is, in a pipe plain and whole.

use std::io::IsTerminal;

use comfy_table::{
    Attribute, Cell, CellAlignment, Color, ColumnConstraint, ContentArrangement, Table, Width,
};

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
        // A serial console may say 0: it does not know.
        Terminal { width: Table::new().width().filter(|width| *width > 0), colour: !plain }
    }
}

/// How a column stands, and what a narrow terminal may do to it. Values are never broken: half an
/// address or port reads as another one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// To the left, broken between words where there is no room.
    Text,
    /// To the left, in one piece.
    Word,
    /// To the right, in one piece.
    Number,
    /// A number that is left out where there is no room, the last such column first.
    Spare,
    /// Likewise a word.
    SpareWord,
}

impl Kind {
    fn is_spare(self) -> bool {
        matches!(self, Kind::Spare | Kind::SpareWord)
    }
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

/// Lays `rows` out under `header`, which is left out where all titles are empty. Names the columns
/// that there was no room for.
pub fn render(header: &[(&str, Kind)], mut rows: Vec<Vec<Field>>, terminal: Terminal) -> String {
    let mut header = header.to_vec();
    let mut left_out = Vec::new();
    while let Some(width) = terminal.width
        && least_width(&header, &rows) > width
        && let Some(spare) = header.iter().rposition(|(_, kind)| kind.is_spare())
    {
        left_out.insert(0, header.remove(spare).0);
        rows.iter_mut().for_each(|row| drop(row.remove(spare)));
    }
    let text = lay_out(&header, rows, terminal);
    match left_out.as_slice() {
        [] => text,
        titles => {
            format!("{text}(no room here for {}: a wider terminal or --json has it)\n", titles.join(", "))
        }
    }
}

fn lay_out(header: &[(&str, Kind)], rows: Vec<Vec<Field>>, terminal: Terminal) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    if terminal.colour {
        table.enforce_styling();
    } else {
        table.force_no_tty();
    }
    if header.iter().any(|(title, _)| !title.is_empty()) {
        table.set_header(header.iter().map(|(title, _)| Cell::new(title).add_attribute(Attribute::Bold)));
    }
    let widths = whole_widths(header, &rows);
    for row in rows {
        table.add_row(row.into_iter().map(|field| match field.colour {
            Some(colour) => Cell::new(field.text).fg(colour),
            None => Cell::new(field.text),
        }));
    }
    for (column, (_, kind)) in table.column_iter_mut().zip(header) {
        column.set_padding((0, 2));
        if matches!(kind, Kind::Number | Kind::Spare) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    if let Some(width) = terminal.width
        && table.column_max_content_widths().iter().map(|column| column + 2).sum::<u16>() > width
    {
        squeeze(&mut table, header, &widths, width);
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// Between the columns of a table that has been made to fit.
const GAP: u16 = 1;

/// How narrow a table can be without a broken value.
fn least_width(header: &[(&str, Kind)], rows: &[Vec<Field>]) -> u16 {
    whole_widths(header, rows).iter().map(|width| width + GAP).sum()
}

/// Makes a table fit that is wider than the terminal, as far as no value has to be broken.
fn squeeze(table: &mut Table, header: &[(&str, Kind)], widths: &[u16], width: u16) {
    let width = width.max(widths.iter().map(|width| width + GAP).sum());
    table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    for ((column, _), whole) in table.column_iter_mut().zip(header).zip(widths) {
        column.set_padding((0, GAP));
        column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(whole + GAP)));
    }
}

/// What each column needs so that none of its values, and no word of its texts and title, is broken.
fn whole_widths(header: &[(&str, Kind)], rows: &[Vec<Field>]) -> Vec<u16> {
    let length = |text: &str| u16::try_from(text.chars().count()).unwrap_or(u16::MAX);
    let title = |column: usize| header[column].0.split(' ').map(length).max();
    let fields = |column: usize| {
        let longest = move |field: &Field| match header[column].1 {
            Kind::Text => field.text.split(' ').map(length).max().unwrap_or(0),
            _ => length(&field.text),
        };
        rows.iter().filter_map(move |row| row.get(column)).map(longest).max()
    };
    (0..header.len()).map(|column| title(column).max(fields(column)).unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(terminal: Terminal) -> String {
        let long = "a word and another word ".repeat(10);
        let rows = vec![vec![1.into(), Field::coloured("active", Color::Green), long.trim().into()]];
        render(&[("ID", Kind::Number), ("STATE", Kind::Word), ("WHY", Kind::Text)], rows, terminal)
    }

    #[test]
    fn in_a_pipe_there_is_no_colour_and_nothing_is_wrapped() {
        let text = sample(Terminal::default());
        assert!(!text.contains('\u{1b}'));
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.lines().all(|line| line.trim_end() == line));
    }

    #[test]
    fn no_value_is_broken_where_there_is_no_room() {
        let header =
            [("EXTERNAL", Kind::Word), ("WHY", Kind::Text), ("PKTS IN", Kind::Spare), ("DROPS", Kind::Spare)];
        let row = || vec!["203.0.113.10:8080".into(), "not at all".into(), 1_234_567.into(), 89.into()];
        let at = |width| render(&header, vec![row()], Terminal { width: Some(width), colour: false });
        for (width, shown, left_out) in [
            (60, vec!["PKTS IN", "DROPS", "1234567"], None),
            (36, vec!["not", "1234567", "89"], None),
            (35, vec!["1234567"], Some("no room here for DROPS")),
            (25, vec!["all"], Some("no room here for PKTS IN, DROPS")),
            (10, vec!["203.0.113.10:8080"], Some("no room here for PKTS IN, DROPS")),
        ] {
            let text = at(width);
            assert!(shown.iter().all(|word| text.contains(word)), "{width}: {text}");
            assert!(text.contains("203.0.113.10:8080"), "{width}: {text}");
            assert!(
                left_out.map_or(!text.contains("no room"), |words| text.contains(words)),
                "{width}: {text}"
            );
        }
    }

    #[test]
    fn on_a_terminal_it_fits_and_has_colour() {
        let plain = sample(Terminal { width: Some(60), colour: false });
        assert!(plain.lines().count() > 2 && plain.lines().all(|line| line.len() <= 60), "{plain}");
        assert!(plain.contains("active"), "only text is broken: {plain}");
        assert!(sample(Terminal { width: Some(60), colour: true }).contains('\u{1b}'));
    }
}
