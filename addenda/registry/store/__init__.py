"""Storage: tables, ledger, tasks and their artifacts, queries."""
