"""Every change to vLLM, one small file each, and the ledger that applies, reports and verifies them.

`ledger` is the only module that others need. A file here holds one `ENTRY`; `ledger.ENTRIES` lists them in order.
"""
