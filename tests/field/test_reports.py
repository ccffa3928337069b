"""The list of reports itself."""

import re
from collections import Counter

from tests.field.reports import reported_tests


def test_each_test_has_one_report_with_a_thread_and_a_sentence():
    for name, reports in reported_tests():
        assert len(reports) == 1, name
        assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", reports[0].thread), name
        assert re.fullmatch(r"[A-Z0-9`].{20,200}\.", reports[0].happened), name


def test_no_report_is_tried_twice():
    threads = Counter(report.thread.lower() for _, reports in reported_tests() for report in reports)
    assert threads
    assert {thread for thread, times in threads.items() if times > 1} == set()
