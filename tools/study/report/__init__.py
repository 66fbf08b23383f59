"""The report of a study: W/report/, from W/study.json and W/results.json."""

from tools.study.report.writing import write as write
