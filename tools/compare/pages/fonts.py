"""The fonts of figures: a variant may be named in any script."""

FIRST = 'DejaVu Sans'  # matplotlib's own: Latin, Greek, Cyrillic and more
# What may be installed and has Chinese, Japanese and Korean characters, on
# Linux, macOS and Windows.
MORE = ('Noto Sans CJK SC', 'Noto Sans CJK JP', 'Noto Sans CJK KR',
        'Noto Sans SC', 'Noto Sans JP', 'Noto Sans KR', 'Source Han Sans SC',
        'WenQuanYi Zen Hei', 'WenQuanYi Micro Hei', 'Droid Sans Fallback',
        'IPAGothic', 'NanumGothic', 'PingFang SC', 'Hiragino Sans',
        'Hiragino Sans GB', 'Apple SD Gothic Neo', 'Arial Unicode MS',
        'Microsoft YaHei', 'Yu Gothic', 'Malgun Gothic')


def families() -> list[str]:
  """Returns what font.family is for figures: matplotlib takes a character that
  one font lacks from the next, and warns of those that are not installed."""
  from matplotlib import font_manager
  installed = {*font_manager.get_font_names()}
  return [FIRST, *(name for name in MORE if name in installed)]
