"""The factory's page, and the same on a terminal: what there is and what happens, from the books and the runs' logs alone.

Readings  loop, cycles, corpora, runs, releases, traffic, feedback, drift, spending, alerts: each a function from books to values
Shown as  HTML (rendering, views), JSON (the same values), and one screen of a terminal (screen)
Done      actions.py, each after a confirmation, in the transaction of the registry that also writes the audit
Law       nothing here starts or asks Ray; what comes from records is escaped where it is shown
"""
