"""The paper's tables and figures at any preset's scale: `omniid reproduce`.

Each table is a file that declares rows: how a representation is trained, and what the paper says of it. Everything else is
shared: trainings and measurements are kept by what they depend on, and a report sets our numbers beside the paper's.
"""
