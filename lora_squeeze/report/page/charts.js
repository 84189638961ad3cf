// The figures, drawn with Observable Plot. Each function makes one figure of the given width.
"use strict";

const Charts = (() => {
  const look = { background: "transparent", color: "inherit", fontSize: "12px", overflow: "visible" };
  const percent = { tickFormat: (value) => `${+(100 * value).toFixed(1)}%`, grid: true };
  const powers = (rank) => [...d3.range(0, Math.floor(Math.log2(rank)) + 1).map((power) => 2 ** power)];

  // Put a figure in its place. Plot draws again whatever changed; that takes milliseconds.
  function show(id, draw) {
    const place = document.getElementById(id);
    place.replaceChildren(draw(Math.max(260, place.clientWidth)));
    return place.firstChild;
  }

  function variance(record, width) {
    const curves = [
      ["mean", "mean of the layers", "var(--mean)"],
      ["worst", "worst layer", "var(--worst)"],
      ["best", "best layer", "var(--best)"],
      ["energy", "weighted by energy", "var(--weighted)"],
    ];
    const points = curves.flatMap(([key, label]) =>
      record.curves[key].map((kept, index) => ({ rank: index + 1, kept, label }))
    );
    const at = record.curves.mean.map((_, index) => ({
      rank: index + 1,
      mean: record.curves.mean[index],
      title: [
        `rank ${index + 1}`,
        ...curves.map(([key, label]) => `${label}: ${Text.percent(record.curves[key][index])}`),
      ].join("\n"),
    }));
    const marks = [
      Plot.areaY(at, {
        x: "rank",
        y1: (point) => record.curves.worst[point.rank - 1],
        y2: (point) => record.curves.best[point.rank - 1],
        fill: "var(--mean)",
        fillOpacity: 0.12,
      }),
      ...curves.map(([key, label]) =>
        Plot.lineY(points.filter((point) => point.label === label), {
          x: "rank",
          y: "kept",
          stroke: "label",
          strokeWidth: key === "mean" ? 2.75 : 1.75,
          strokeDasharray: key === "energy" ? "6 3" : null,
        })
      ),
      Plot.ruleX([record.recommended.rank], { stroke: "currentColor", strokeDasharray: "2 3" }),
      Plot.text([record.recommended.rank], {
        x: (rank) => rank,
        frameAnchor: "bottom",
        dy: -6,
        dx: -5,
        textAnchor: "end",
        text: (rank) => `recommended: ${rank}`,
      }),
      Plot.ruleX(at, Plot.pointerX({ x: "rank", stroke: "currentColor", strokeOpacity: 0.4 })),
      Plot.tip(at, Plot.pointerX({ x: "rank", y: "mean", title: "title" })),
    ];
    return Plot.plot({
      width,
      height: 310,
      marginLeft: 48,
      marginBottom: 42,
      style: look,
      ariaLabel: "Retained variance by rank: mean, worst and best layer, and weighted by energy",
      x: { type: record.source_rank > 1 ? "log" : "linear", base: 2, label: "rank", ticks: powers(record.source_rank), tickFormat: "d" },
      y: { ...percent, label: "retained variance", domain: [Math.min(...record.curves.worst, 0.9), 1] },
      color: { domain: curves.map(([, label]) => label), range: curves.map(([, , color]) => color), legend: true },
      marks,
    });
  }

  const sizeText = (setting) =>
    [
      setting.spelling,
      `parameters: ${Text.count(setting.parameters)} (${Text.percent(setting.share)})`,
      ...(setting.bytes ? [`weights: ${Text.bytes(setting.bytes)}`] : []),
      `energy kept: ${Text.percent(setting.energy)}, worst layer ${Text.percent(setting.worst)}`,
      `ranks: ${setting.smallest} to ${setting.largest}`,
    ].join("\n");

  function frontier(record, width, { chosen, within }) {
    const mine = record.settings.filter((setting) => setting.policy === chosen.policy);
    const least = d3.quantile(record.settings.map((setting) => setting.energy).sort(d3.ascending), 0.02);
    const at = { x: "share", y: "energy" };
    return Plot.plot({
      width,
      height: 310,
      marginLeft: 48,
      marginBottom: 42,
      style: look,
      ariaLabel: `Energy kept against parameters for every policy; ${chosen.policy} is highlighted`,
      x: { type: "sqrt", domain: [0, 1], label: "parameters", ...percent, ticks: [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1] },
      y: { ...percent, label: "energy kept", domain: [Math.floor(least * 20) / 20, 1], clamp: true },
      marks: [
        Plot.lineY(record.settings, { ...at, z: "policy", stroke: "var(--cut)", strokeWidth: 0.9, clip: true }),
        Plot.lineY(mine, { ...at, stroke: "var(--accent)", strokeWidth: 2.5, clip: true }),
        Plot.dot(within, { ...at, r: 3.5, fill: "var(--paper)", stroke: "var(--control)", strokeWidth: 1.5, clip: true }),
        Plot.dot([chosen], { ...at, r: 6, fill: "var(--accent)", stroke: "var(--paper)", strokeWidth: 1.5 }),
        Plot.tip(record.settings, Plot.pointer({ ...at, title: sizeText, clip: false })),
      ],
    });
  }

  function strips(record, width, { within, policies, chosen }) {
    const order = record.in_order;
    const values = new Float64Array(policies.length * order.length).fill(NaN);
    for (const setting of within) {
      const row = policies.indexOf(setting.policy);
      order.forEach((layer, column) => (values[row * order.length + column] = setting.rank(layer.index)));
    }
    const starts = order.flatMap((layer, place) =>
      place === 0 || layer.column !== order[place - 1].column ? [{ place, label: record.columns[layer.column] }] : []
    );
    const step = Math.ceil((starts.length * 34) / (width - 130));
    const shown = starts.filter((_, index) => index % step === 0);
    const row = policies.indexOf(chosen.policy);
    return Plot.plot({
      width,
      height: 46 + 17 * policies.length,
      marginLeft: 118,
      marginBottom: 34,
      style: look,
      ariaLabel: "Rank of every layer, one row for each policy; the table above has the same settings",
      x: { domain: [0, order.length], label: record.in_order_label, ticks: shown.map((start) => start.place) },
      y: { domain: [policies.length, 0], label: null },
      color: { scheme: "viridis", domain: [0, record.source_rank], label: "rank", legend: true },
      marks: [
        Plot.axisX(shown.map((start) => start.place), {
          tickFormat: (place) => starts.find((start) => start.place === place).label,
        }),
        Plot.axisY(d3.range(policies.length).map((index) => index + 0.5), {
          tickFormat: (value) => policies[Math.floor(value)],
          tickSize: 0,
        }),
        Plot.raster(values, { width: order.length, height: policies.length, imageRendering: "pixelated" }),
        Plot.rect([row], {
          x1: 0,
          x2: order.length,
          y1: (index) => index,
          y2: (index) => index + 1,
          stroke: "var(--ink)",
          strokeWidth: 2,
        }),
      ],
    });
  }

  function spectrum(record, width, { layer, setting }) {
    const rank = setting.rank(layer.index);
    const points = Array.from(layer.sigma, (sigma, index) => ({
      k: index + 1,
      sigma,
      kept: layer.kept[index],
      state: index < rank ? "kept" : "cut off",
      title: `${index + 1}: σ = ${Text.short(sigma)}\nretained variance at rank ${index + 1}: ${Text.percent(layer.kept[index])}`,
    }));
    const positive = points.filter((point) => point.sigma > 0);
    if (!positive.length) return element("p", { class: "soft" }, "This layer is exactly zero: it has no spectrum.");
    const x = { label: "component", domain: [0.5, points.length + 0.5], tickFormat: "d" };
    const color = { domain: ["kept", "cut off"], range: ["var(--accent)", "var(--cut)"] };
    const cut = Plot.ruleX(rank < points.length ? [rank + 0.5] : [], { stroke: "currentColor", strokeDasharray: "2 3" });
    const at = (y) => ({ x: "k", y, fill: "state", r: Math.min(4, Math.max(1.5, width / points.length / 3)) });
    const values = Plot.plot({
      width,
      height: 190,
      marginLeft: 56,
      style: look,
      ariaLabel: `Singular values of ${layer.name}`,
      x: { ...x, label: null },
      y: { type: "log", label: "singular value", grid: true, ticks: 4, tickFormat: Text.short },
      color: { ...color, legend: true },
      marks: [cut, Plot.dot(positive, at("sigma")), Plot.tip(positive, Plot.pointerX({ x: "k", y: "sigma", title: "title" }))],
    });
    const retained = Plot.plot({
      width,
      height: 150,
      marginLeft: 56,
      style: look,
      ariaLabel: `Retained variance of ${layer.name} by rank`,
      x,
      y: { ...percent, label: "retained variance", domain: [Math.min(0.9, layer.kept[0]), 1], ticks: 4 },
      color,
      marks: [
        cut,
        Plot.lineY(points, { x: "k", y: "kept", stroke: "var(--cut)" }),
        Plot.dot(points, at("kept")),
        Plot.tip(points, Plot.pointerX({ x: "k", y: "kept", title: "title" })),
      ],
    });
    return element("div", {}, values, retained);
  }

  return { look, show, variance, frontier, strips, spectrum };
})();
