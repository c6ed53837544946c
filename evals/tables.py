"""Reading comma-separated tables."""
import csv

from data.errors import InputError
from data.files import decode, read_lines


def csv_records(path):
    """Yield (line number, {column: text}) for the rows of a .csv file; a short row lacks its last columns.

    Raises InputError with file and line for text that is not UTF-8, unmatched quotes, a column that stands
    there twice and a row that is too long.
    """
    table = csv.DictReader(_decoded(path), strict=True)
    try:
        columns = table.fieldnames = [name.strip() for name in table.fieldnames or ()]
        for name in columns:
            if name and columns.count(name) > 1:
                raise InputError(f"{path}:{table.line_num}: the column {name!r} stands there twice")
        for row in table:
            if None in row:
                raise InputError(f"{path}:{table.line_num}: more cells than the {len(columns)} columns; "
                                 "a comma in a text needs quotes around it")
            yield table.line_num, {name: text for name, text in row.items() if text is not None}
    except csv.Error as error:
        where = f"{path}:{table.reader.line_num}"
        raise InputError(f"{where}: not a line of a comma-separated table ({error})") from None


def _decoded(path):
    for number, line in read_lines(path):
        text = decode(line, f"{path}:{number}") + "\n"
        yield text.removeprefix("\ufeff") if number == 1 else text
