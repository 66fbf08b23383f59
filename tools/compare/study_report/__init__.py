"""The report of a study: W/report/, from W/study.json and W/results.json."""

from tools.compare.study_report.writing import write as write
