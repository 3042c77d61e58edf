"""`lab review [BASE]`: what a change does to the pipeline's results, and how sure that is.

Reads what git tracks, so a fresh clone is enough: no model is pulled. `command` is the way in;
`revisions` reads, `intervals`, `seeds`, `gates`, `stages` and `changes` judge, `page` and `charts` show.
"""
