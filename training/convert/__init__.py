"""Converters of public data sets to the project's one JSONL form (`zreward.pairs`), for `zreward data convert`.

A converter is a generator from a source to records (`records`), one file a set; `formats` is the table of them and
`write` puts what they yield into files. docs/data.md says what each reads and how its scale is mapped.
"""
