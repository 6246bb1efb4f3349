"""The style sheet of the report: light and dark, wide and narrow, screen and paper."""

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--paper:#fff;--panel:#f6f8fa;
--rule:#d0d7de;--grid:#e6e9ed;--l0:#0550ae;--l1:#953800;--l2:#0b6b75;--l3:#6e40c9;
--kept:#116329;--rolled_back:#a40e26;--refused:#6639ba;--pending:#57606a;
--added:#dafbe1;--removed:#ffebe9;--changed:#fff5c2;--hit:#f2cc60}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9da7b3;--paper:#0d1117;
--panel:#161b22;--rule:#3d444d;--grid:#262c35;--l0:#79c0ff;--l1:#ffa657;--l2:#56d4dd;--l3:#d2a8ff;
--kept:#56d364;--rolled_back:#ff7b72;--refused:#d2a8ff;--pending:#9da7b3;
--added:#12361d;--removed:#4a1b1f;--changed:#3a3000;--hit:#7a5c00}}
@media print{:root{color-scheme:light;--ink:#000;--soft:#444;--paper:#fff;--panel:#fff;
--rule:#999;--grid:#ddd;--l0:#0550ae;--l1:#953800;--l2:#0b6b75;--l3:#6e40c9;
--kept:#116329;--rolled_back:#a40e26;--refused:#6639ba;--pending:#444;
--added:#dafbe1;--removed:#ffebe9;--changed:#fff5c2;--hit:#f2cc60}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main,header,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:32px}footer{padding-bottom:40px;color:var(--soft);font-size:.875rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 4px}
h2{font-size:1.25rem;margin:44px 0 12px;padding-bottom:6px;border-bottom:1px solid var(--rule)}
h3{font-size:1.0625rem;line-height:1.35;margin:0}h4{font-size:.875rem;margin:14px 0 4px}
p{margin:6px 0}.soft{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:12px;
margin:20px 0 0}
.tile{background:var(--panel);border:1px solid var(--rule);border-radius:10px;padding:12px 14px}
.tile dt{color:var(--soft);font-size:.8125rem}
.tile dd{margin:2px 0 0;font-size:1.125rem;font-weight:600;line-height:1.3;
font-variant-numeric:tabular-nums}
.tile dd+dd{font-size:.8125rem;font-weight:400;color:var(--soft);line-height:1.45}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
.chart{margin:0;border:1px solid var(--rule);border-radius:10px;padding:10px 10px 4px;min-width:0}
.chart figcaption{font-weight:600;font-size:.9375rem;padding:0 4px 4px}
.chart svg{display:block;width:100%;height:auto}
.chart text{font-size:13px;fill:var(--soft);font-variant-numeric:tabular-nums}
.grid{stroke:var(--grid);fill:none}.axis{stroke:var(--soft);fill:none}
.line{fill:none;stroke-width:2.2;stroke-linecap:round;stroke-linejoin:round}
.l0{stroke:var(--l0)}.l1{stroke:var(--l1)}.l2{stroke:var(--l2)}.l3{stroke:var(--l3)}
.d0{fill:var(--l0)}.d1{fill:var(--l1)}.d2{fill:var(--l2)}.d3{fill:var(--l3)}
.band{fill:var(--l0);opacity:.16}.dot{stroke:var(--paper);stroke-width:.5}
.mark{fill:none;stroke-width:1.4;opacity:.75}.shape{stroke:var(--paper);stroke-width:1}
.mark.kept{stroke:var(--kept)}.shape.kept{fill:var(--kept)}
.mark.rolled_back{stroke:var(--rolled_back)}.shape.rolled_back{fill:var(--rolled_back)}
.mark.refused{stroke:var(--refused)}.shape.refused{fill:var(--refused)}
.mark.pending{stroke:var(--pending)}
.shape.pending{fill:var(--paper);stroke:var(--pending);stroke-width:1.6}
.event:hover .mark{stroke-width:3;opacity:1}
.swatch{flex:none;vertical-align:-3px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:6px 20px;margin:0 0 12px;padding:0;
font-size:.875rem}.legend li{display:flex;align-items:center;gap:7px}
.legend+.soft{font-size:.875rem;margin-bottom:12px}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:8px;margin:6px 0}
.scroll:focus-visible{outline:2px solid var(--l0);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums;
overflow-wrap:normal}
th,td{padding:6px 10px;text-align:left;vertical-align:top;border-top:1px solid var(--rule);
white-space:nowrap}
thead tr:first-child th{border-top:0}thead th{color:var(--soft);font-weight:600;font-size:.8125rem}
tbody th{font-weight:600}.num{text-align:right}.edge{border-left:2px solid var(--rule)}
.cards{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));
align-items:start}
.card{border:1px solid var(--rule);border-left:5px solid var(--pending);border-radius:10px;
padding:14px 16px;min-width:0}
.card.kept{border-left-color:var(--kept)}.card.rolled_back{border-left-color:var(--rolled_back)}
.card.refused{border-left-color:var(--refused)}
.card>header{padding:0;display:flex;flex-wrap:wrap;gap:4px 12px;justify-content:space-between}
.card th,.card td{white-space:normal}.card th,.card td{padding:5px 8px}
.badge{display:inline-flex;align-items:center;gap:5px;font-weight:600;font-size:.875rem;
white-space:nowrap}
.badge.kept{color:var(--kept)}.badge.rolled_back{color:var(--rolled_back)}
.badge.refused{color:var(--refused)}.badge.pending{color:var(--pending)}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:2px 14px;margin:8px 0;
font-size:.875rem}.facts dt{color:var(--soft)}.facts dd{margin:0;min-width:0}
.added td,.added th{background:var(--added)}.removed td,.removed th{background:var(--removed)}
.changed td,.changed th{background:var(--changed)}
mark{background:var(--hit);color:inherit;border-radius:3px;padding:0 3px;font-weight:700}
.bar{display:block;height:4px;border-radius:2px;background:var(--l0);margin-top:3px;
min-width:1px;margin-left:auto}
details{margin:14px 0}summary{cursor:pointer;color:var(--soft)}
.pair{display:grid;gap:0 28px;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media (max-width:800px){.tiles{grid-template-columns:1fr 1fr}}
@media (max-width:520px){main,header,footer{padding-left:14px;padding-right:14px}
h1{font-size:1.4375rem}.tiles{gap:8px}.tile{padding:10px}
.tile dd{font-size:1rem}.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:6px}
.card{padding:12px}.card th,.card td{padding:4px 5px}.chart{padding:8px 4px 2px}}
@media print{body{font-size:11pt}main,header,footer{max-width:none;padding:0}
.scroll{overflow:visible;border-color:#ccc}th,td{white-space:normal}
.card,.chart,.tile,tr{break-inside:avoid}h2,h3{break-after:avoid}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""
