"""Sweeps: many runs that differ in what they declare, and in nothing else.

What lies in a sweep's folder W:
  sweep.json                 the points, what they change, what they cost
  ledger.sqlite              the state of every run (layout.py)
  points/NAME/seed-S/        the folder of one run, as train.py makes it, and
    log.txt                  what it printed
    eval.json                the figures of the evaluations that it owed
A study's folder has such a folder for each phase, study.json and study.sqlite:
its plan, and every plan that it had; and results.json (plan.py).
"""
