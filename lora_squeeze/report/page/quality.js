// What was measured on a task, where it was.
"use strict";

const Quality = (() => {
  const COLORS = ["var(--mean)", "var(--worst)", "var(--best)", "var(--weighted)", "var(--measured)"];
  const colors = (names) => ({ domain: names, range: names.map((_, index) => COLORS[index % COLORS.length]) });
  const number = (value) => (value === null || value === undefined ? "–" : `${+value.toPrecision(4)}`);

  function chart(quality, metric, width) {
    const lines = [...new Set(quality.points.map((point) => point.line))];
    const points = quality.points.map((point) => ({ ...point, ...point.metrics[metric] }));
    const sorted = d3.sort(points, (point) => point.share);
    const at = { x: "share", y: "value" };
    const [least, most] = d3.extent(points, (point) => point.share);
    const shares = d3.range(0, 12).map((power) => 2 ** -power).filter((share) => share >= least * 0.9 && share <= most * 1.1);
    return Plot.plot({
      width,
      height: 280,
      marginLeft: 52,
      marginBottom: 42,
      style: Charts.look,
      ariaLabel: `${metric} against parameters, one line a policy; the table below has the same numbers`,
      x: { type: "log", base: 2, label: "parameters", ticks: shares, tickFormat: (share) => Text.percent(share, share < 0.1 ? 1 : 0) },
      y: { label: metric, grid: true, nice: true },
      color: { ...colors(lines), legend: true },
      marks: [
        Plot.ruleY([quality.original[metric]], { stroke: "currentColor", strokeDasharray: "4 3" }),
        Plot.text([quality.original[metric]], { y: (value) => value, frameAnchor: "left", dx: 4, dy: -6, textAnchor: "start", text: () => "original" }),
        Plot.ruleX(points, { x: "share", y1: "low", y2: "high", stroke: "line", strokeOpacity: 0.55 }),
        Plot.lineY(sorted, { ...at, z: "line", stroke: "line", strokeWidth: 2 }),
        Plot.dot(points, { ...at, fill: "line", symbol: "line", r: 4 }),
        Plot.tip(points, Plot.pointer({ ...at, title: (point) => `${point.setting}\n${metric}: ${number(point.value)} (${number(point.low)} to ${number(point.high)})\n${point.verdict}` })),
      ],
    });
  }

  function table(quality) {
    const cell = (text) => element("td", { class: "number" }, text);
    const heads = ["Setting", "Parameters", ...quality.metrics.flatMap((metric) => [metric, "against the original"])];
    const rows = quality.points.map((point) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, element("code", {}, point.setting), point.line.includes(" ") ? ` ${point.line.split(" ").slice(1).join(" ")}` : ""),
        cell(Text.percent(point.share, 1)),
        ...quality.metrics.flatMap((metric) => [cell(number(point.metrics[metric].value)), cell(point.metrics[metric].verdict)])
      )
    );
    const original = element("tr", {}, element("th", { scope: "row" }, "original"), cell("100%"), ...quality.metrics.flatMap((metric) => [cell(number(quality.original[metric])), cell("")]));
    fill("quality-table", heads, [original, ...rows]);
  }

  function fill(id, heads, rows) {
    const found = document.getElementById(id);
    found.tHead.replaceChildren(element("tr", {}, ...heads.map((head, index) => element("th", { scope: "col", class: index ? "number" : undefined }, head))));
    found.tBodies[0].replaceChildren(...rows);
  }

  function show(record) {
    const { quality } = record;
    if (!quality) return;
    document.getElementById("quality-figure").hidden = false;
    document.getElementById("quality-title").textContent = quality.title;
    const place = document.getElementById("quality");
    const width = Math.max(260, Math.min(620, quality.metrics.length > 1 && place.clientWidth > 700 ? place.clientWidth / 2 - 16 : place.clientWidth));
    place.replaceChildren(...quality.metrics.map((metric) => chart(quality, metric, width)));
    table(quality);
  }

  return { show, colors, number, fill };
})();
