"""Reading comma-separated tables."""
import csv

from data.errors import InputError
from data.files import read_lines


def csv_records(path):
    """Yield (line number, {column: text}) for each row of a .csv file, plain or compressed.

    A row that is too short lacks its last columns. Raises InputError with file and line for text that is not
    UTF-8, a column that stands there twice, a row that is too long, and quotes that do not match.
    """
    table = csv.DictReader(_decoded(path), strict=True)
    try:
        columns = [name.strip() for name in table.fieldnames or ()]
        for name in columns:
            if name and columns.count(name) > 1:
                raise InputError(f"{path}:{table.line_num}: the column {name!r} stands there twice")
        table.fieldnames = columns
        for record in table:
            if None in record:
                raise InputError(f"{path}:{table.line_num}: more cells than the {len(columns)} columns; "
                                 "a comma in a text needs quotes around it")
            yield table.line_num, {name: text for name, text in record.items() if text is not None}
    except csv.Error as error:
        line = table.reader.line_num
        raise InputError(f"{path}:{line}: not a line of a comma-separated table ({error})") from None


def _decoded(path):
    for number, line in read_lines(path):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8") + "\n"
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: not UTF-8 text (at byte {error.start}); is this a table?"
                             ) from None
