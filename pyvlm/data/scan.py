"""One pass over a data file: which records are good, how long they are, and what is wrong with the others."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from pyvlm.data.bad_records import BadRecord, Report
from pyvlm.data.readers import RecordFile
from pyvlm.data.records import decode_image, images_of
from pyvlm.models.speaker import Messages


@dataclass(frozen=True)
class Scan:
    """What a pass found; K records were kept.

    Attributes:
        kept: int64 [K], the numbers of the good records, rising.
        lengths: int64 [K], what `measure` gave.
        images: int64 [K], how many each has.
        turns: int64 [K], how many each has.
        passed: bool [K], what `test` gave.
        report: on the others.
    """

    kept: np.ndarray
    lengths: np.ndarray
    images: np.ndarray
    turns: np.ndarray
    passed: np.ndarray
    report: Report


def scan(
    file: RecordFile,
    measure: Callable[[Messages], int],
    test: Callable[[Messages], bool] = lambda messages: True,
    decode: bool = False,
) -> Scan:
    """Reads every record once.

    Args:
        file: of the records.
        measure: gives the length of a conversation; where it raises ValueError the record is bad.
        test: is asked about each good record.
        decode: also decode every image; it takes its time, and finds the damaged ones.
    """
    report = Report(str(file.path), total=len(file))
    rows = []
    for i in tqdm(range(len(file)), desc=file.path.name, unit=" records", leave=False, disable=None):
        try:
            messages = file[i].messages
            images = images_of(messages)
            if decode:
                for image in images:
                    decode_image(image)
            rows.append((i, _measured(measure, messages), len(images), len(messages), test(messages)))
        except BadRecord as error:
            report.add(file.place(i), error)
    columns = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    return Scan(columns[0], columns[1], columns[2], columns[3], columns[4] == 1, report)


def _measured(measure: Callable[[Messages], int], messages: Messages) -> int:
    try:
        return measure(messages)
    except BadRecord:
        raise
    except ValueError as error:
        raise BadRecord("refused by the processor", str(error)) from error
