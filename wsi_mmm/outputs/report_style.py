"""The look of report.html."""

STYLE = """
:root{--ink:#1d2230;--soft:#667085;--line:#e4e7ee;--paper:#fff;--ground:#f6f7fa;--accent:#3d6fd8}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaf0;--soft:#9aa3b5;--line:#2d3342;--paper:#1b1f2a;--ground:#12151d}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}
h1{margin:0;font-size:26px;letter-spacing:-.01em}h1 small{font-weight:400;color:var(--soft);font-size:15px}
h2{margin:0;font-size:18px;overflow-wrap:anywhere}
h3{margin:18px 0 6px;font-size:14px;color:var(--soft);font-weight:600}
header p{margin:4px 0 18px;color:var(--soft)}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:12px;margin-bottom:20px}
.figures div,article,.about,.wide{background:var(--paper);border:1px solid var(--line);border-radius:10px}
.figures div{padding:12px 16px}.figures b{display:block;font-size:21px;font-variant-numeric:tabular-nums}
.figures span{color:var(--soft);font-size:13px}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th{position:sticky;top:0;background:var(--paper);color:var(--soft);font-weight:600;text-align:right;white-space:nowrap}
th,td{padding:8px 9px;border-bottom:1px solid var(--line)}td{text-align:right;white-space:nowrap}
th:nth-child(-n+2),td:nth-child(-n+2){text-align:left}tbody tr:last-child td{border-bottom:0}
td:first-child{max-width:260px;overflow:hidden;text-overflow:ellipsis}
td em{color:#c2513a;font-style:normal;font-weight:600}
.chip{display:inline-block;padding:1px 9px;border-radius:99px;font-size:12px;font-weight:600;vertical-align:2px;
color:#475467;background:#e9ecf2}.chip.done{color:#11683f;background:#d5f2e2}.chip.partial{color:#8a5300;background:#fdeecb}
.chip.failed,.chip.cancelled{color:#98281a;background:#fbdcd7}
.meter{display:inline-block;width:54px;height:6px;border-radius:3px;background:var(--line);overflow:hidden;vertical-align:2px}
.meter i{display:block;height:100%;background:var(--accent)}
.cards{display:grid;grid-template-columns:1fr;gap:18px;margin:20px 0}
article{padding:18px 20px;min-width:0}
article img{display:block;width:100%;border-radius:6px;margin-top:12px;background:#fff}
.uri{margin:2px 0 0;color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.error{margin:12px 0 0;padding:10px 14px;border-left:3px solid #c2513a;background:#c2513a1a;overflow-wrap:anywhere}
svg{display:block;width:100%;height:14px;border-radius:4px}ul{margin:6px 0;padding-left:20px}
.keys{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;font-size:13px;color:var(--soft)}
.keys i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
details{margin-top:14px}summary{cursor:pointer;font-weight:600;font-size:14px}.failures summary{color:#c2513a}
.failures ul{columns:260px;font-size:13px;font-variant-numeric:tabular-nums}
code,pre{font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace}code{overflow-wrap:anywhere}
.about{padding:14px 20px}pre{overflow-x:auto;margin:10px 0 0}
@media (max-width:640px){main{padding:16px 10px 40px}article{padding:14px}}
@media print{body{background:#fff}details{display:none}}
""".strip()
