// A campaign: what its conditions reached, how they learned, what squeezing gained.
"use strict";

const Campaign = (() => {
  const at = (id) => document.getElementById(id);
  const { colors, number, fill } = Quality;
  const spread = (one) => (!one ? "–" : one.count > 1 ? `${number(one.mean)} ± ${+one.error.toPrecision(2)}` : number(one.mean));

  function reached(campaign, width) {
    const points = campaign.conditions.flatMap(({ name, means }) => (means[campaign.metric] ? [{ name, ...means[campaign.metric] }] : []));
    const longest = Math.max(...points.map((point) => point.name.length), 4);
    const left = Math.min(width * 0.45, 16 + 6.4 * longest);
    const room = Math.max(6, Math.floor((left - 16) / 6.4));
    return Plot.plot({
      width,
      height: 56 + 28 * points.length,
      marginLeft: left,
      marginBottom: 40,
      style: Charts.look,
      ariaLabel: `${campaign.metric} of every condition, mean and standard error over seeds; the table has the same numbers`,
      x: { label: `${campaign.metric}, mean ± standard error`, grid: true, nice: true, inset: 8 },
      y: { label: null, domain: points.map((point) => point.name), tickSize: 0, tickFormat: (name) => (name.length > room ? `…${name.slice(1 - room)}` : name) },
      marks: [
        Plot.ruleY(points, { y: "name", x1: (point) => point.mean - point.error, x2: (point) => point.mean + point.error, stroke: "var(--accent)", strokeWidth: 2 }),
        Plot.dot(points, { y: "name", x: "mean", r: 5, fill: "var(--accent)" }),
        Plot.tip(points, Plot.pointerY({ y: "name", x: "mean", title: (point) => `${point.name}\n${spread(point)} (${point.count} runs)` })),
      ],
    });
  }

  function learning(campaign, width) {
    const names = campaign.curves.map((curve) => curve.name);
    const points = campaign.curves.flatMap(({ name, points }) => points.map((point) => ({ name, ...point })));
    return Plot.plot({
      width,
      height: 280,
      marginLeft: 52,
      marginBottom: 42,
      style: Charts.look,
      ariaLabel: `${campaign.logged} while training, one line a condition`,
      x: { label: "step" },
      y: { label: campaign.logged, grid: true, nice: true },
      color: { ...colors(names), legend: true },
      marks: [
        Plot.areaY(points, { x: "step", y1: (point) => point.mean - point.error, y2: (point) => point.mean + point.error, fill: "name", fillOpacity: 0.14 }),
        Plot.lineY(points, { x: "step", y: "mean", stroke: "name", strokeWidth: 2 }),
        Plot.tip(points, Plot.pointer({ x: "step", y: "mean", title: (point) => `${point.name}\nstep ${point.step}: ${spread(point)}` })),
      ],
    });
  }

  function tables(campaign) {
    const cell = (text) => element("td", { class: "number" }, `${text}`);
    const row = (name, cells) => element("tr", {}, element("th", { scope: "row" }, name), ...cells.map(cell));
    fill("campaign-means", ["Condition", "Runs", ...campaign.metrics], campaign.conditions.map(({ name, means }) =>
      row(name, [Math.max(0, ...Object.values(means).map((mean) => mean.count)), ...campaign.metrics.map((metric) => spread(means[metric]))])
    ));
    const targets = d3.sort(new Set(campaign.gains.map((gain) => gain.target)));
    const sources = d3.sort(new Set(campaign.gains.map((gain) => gain.source)));
    at("campaign-gains").parentElement.hidden = !campaign.gains.length;
    fill("campaign-gains", ["Trained at", ...targets.map((target) => `squeezed to ${target}`)], sources.map((source) =>
      row(`${source}`, targets.map((target) => {
        const gain = campaign.gains.find((one) => one.source === source && one.target === target);
        return gain ? `${gain.mean > 0 ? "+" : ""}${spread(gain)}` : "";
      }))
    ));
    fill("campaign-runs", ["Run", "Status", "Rank", "Steps", "Seconds", ...campaign.metrics], campaign.runs.map((run) =>
      row(run.name, [run.error ? `${run.status}: ${run.error}` : run.status, run.rank || "", run.steps || "", run.seconds ? run.seconds.toFixed(1) : "", ...campaign.metrics.map((metric) => number(run.metrics[metric]))])
    ));
  }

  function show(record) {
    const { campaign } = record;
    if (!campaign) return;
    at("campaign").hidden = false;
    at("campaign-title").textContent = campaign.title;
    at("campaign-config").textContent = campaign.config;
    at("campaign-facts").replaceChildren(...campaign.facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
    at("campaign-run").textContent = `What follows is about the adapter of ${campaign.run}.`;
    if (campaign.metric) Charts.show("reached", (width) => reached(campaign, width));
    if (campaign.curves.length) Charts.show("learning", (width) => learning(campaign, width));
    tables(campaign);
  }

  return { show };
})();
