"""How good the scores turn out to be: served scores, joined with the outcomes that are reported later."""
