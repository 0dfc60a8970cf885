"""Text that tokenizers get wrong."""

from __future__ import annotations

NASTY = [
    "\tif x:\t\n\t\treturn\n",
    "line\r\nbreaks\rof\n\rall kinds\r\n",
    "  leading, trailing  ",
    " ",
    "\n\n\n\n        \n",
    "é ü ß 漢字かな Ωмега",
    "🎉 👩‍👩‍👧 🇪🇺 a\u0301\u200b\u200d",
    "nul\0inside\0\0",
    "▁literal▁▁ ▁ underscores \u2581",
    "\u2585\u2047\ufeff\ufffd <unk> ⁇ ▅",
    "<s></s><unk><0x41><0x0A></s>\n<s>",
    "\x01\x02\x1b[0m\x7f\x80\x9f\u2028\u2029\u0085",
    "\ue000\U0010ffff\ud7ff",
    "\u00a0\u3000 \t \n",
]
