"""The gateway: accepts tasks over HTTP, keeps the ledger of them, and runs schedules."""
