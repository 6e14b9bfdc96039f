"""What a registry holds and how it is kept: tables, ledger, tasks and their artifacts, queries."""
