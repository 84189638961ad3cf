// Layers × module types, in one of several measures; pointed at, or walked over with the arrow keys.
"use strict";

const Heatmap = (() => {
  const MEASURES = {
    effective: {
      label: "Effective rank",
      of: (layer) => layer.effective_rank,
      text: (value) => value.toFixed(value < 9.95 ? 1 : 0),
      color: () => ({ zero: true }),
    },
    rank: {
      label: "Chosen rank",
      of: (layer, setting) => setting.rank(layer.index),
      text: (value) => `${value}`,
      color: (record) => ({ domain: [0, record.source_rank] }),
      chosen: true,
    },
    energy: {
      label: "Spectral energy, share of the adapter",
      of: (layer) => layer.share,
      text: (value) => Text.percent(value, 1).replace("%", ""),
      color: () => ({ type: "sqrt", zero: true, tickFormat: (value) => Text.percent(value, 1) }),
    },
    kept: {
      label: "Retained variance at the chosen rank",
      of: (layer, setting) => retained(layer, setting.rank(layer.index)),
      text: (value) => Text.percent(value, 0).replace("%", ""),
      color: () => ({ tickFormat: (value) => Text.percent(value, 0) }),
      chosen: true,
    },
  };

  const retained = (layer, rank) => (rank === 0 ? (layer.share > 0 ? 0 : 1) : layer.kept[Math.min(rank, layer.values) - 1]);

  // Black or white, whichever can be read on this colour.
  function ink(color) {
    const { r, g, b } = d3.rgb(color);
    const [red, green, blue] = [r, g, b].map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000" : "#fff";
  }

  const shortened = (label, length) => (label.length > length ? `…${label.slice(1 - length)}` : label);

  // Where there is room, layers run from left to right, else from top to bottom.
  function axes(record, width) {
    const across = { count: record.columns.length, labels: record.columns, of: (layer) => layer.column, title: record.column_title };
    const down = { count: record.rows.length, labels: record.rows, of: (layer) => layer.row, title: null };
    const tight = (width - 130) / across.count < 13;
    return tight && down.count < across.count ? [down, across] : [across, down];
  }

  function figure(record, width, { measure, setting }) {
    const { label, of, text, color } = MEASURES[measure];
    const [x, y] = axes(record, width);
    const length = Math.max(8, Math.min(26, Math.floor(width / 18)));
    const left = 14 + 6.4 * Math.min(length, Math.max(3, ...y.labels.map((one) => one.length)));
    const cell = Math.max((width - left - 12) / x.count, 6);
    const height = y.count > 20 ? 16 : 24;
    const slanted = Math.max(...x.labels.map((one) => one.length)) * 6.5 > cell && x.count <= 14;
    const every = slanted ? 1 : Math.ceil((6.5 * Math.max(...x.labels.map((one) => Math.min(8, one.length))) + 6) / cell);
    const bottom = slanted ? 24 + 4.8 * Math.min(length, Math.max(...x.labels.map((one) => one.length))) : 38;
    const value = (layer) => of(layer, setting);
    const room = cell >= 21 && height >= 16 && record.layers.length <= 1200;
    const made = Plot.plot({
      width: left + 12 + cell * x.count,
      height: y.count * height + bottom + 8,
      marginLeft: left,
      marginRight: 12,
      marginTop: 8,
      marginBottom: bottom,
      style: { ...Charts.look, maxWidth: "none" },
      ariaLabel: `${label}: a heatmap of layers and module types; the table below has the same numbers`,
      x: { type: "band", domain: d3.range(x.count), padding: cell > 12 ? 0.06 : 0 },
      y: { type: "band", domain: d3.range(y.count), padding: 0.06 },
      color: { scheme: "viridis", label, legend: true, ...color(record) },
      marks: [
        Plot.axisX(d3.range(0, x.count, every), {
          tickFormat: (index) => shortened(x.labels[index], slanted ? length : 8),
          tickRotate: slanted ? -40 : 0,
          tickSize: 0,
          label: slanted ? null : x.title,
        }),
        Plot.axisY({ tickFormat: (index) => shortened(y.labels[index], length), tickSize: 0, label: null }),
        Plot.cell(record.layers, { x: x.of, y: y.of, fill: value }),
        Plot.tip(record.layers, Plot.pointer({ x: x.of, y: y.of, title: (layer) => told(layer, setting) })),
      ],
    });
    if (room) write(made, record, { x, y, value, text });
    return made;
  }

  function write(made, record, { x, y, value, text }) {
    const [across, down, fill] = ["x", "y", "color"].map((name) => made.scale(name));
    d3.select(made.tagName === "svg" ? made : made.querySelector("svg:last-of-type"))
      .insert("g", "[aria-label=tip]")
      .attr("text-anchor", "middle")
      .attr("font-size", 10)
      .attr("aria-hidden", "true")
      .attr("pointer-events", "none")
      .selectAll("text")
      .data(record.layers)
      .join("text")
      .attr("x", (layer) => across.apply(x.of(layer)) + across.bandwidth / 2)
      .attr("y", (layer) => down.apply(y.of(layer)) + down.bandwidth / 2)
      .attr("dy", "0.35em")
      .attr("fill", (layer) => ink(fill.apply(value(layer))))
      .text((layer) => text(value(layer)));
  }

  function told(layer, setting) {
    const rank = setting.rank(layer.index);
    return [
      layer.name,
      `rank ${layer.rank}, effective rank ${layer.effective_rank.toFixed(1)}, ${Text.percent(layer.share)} of the energy`,
      rank === 0 ? "left out" : `chosen rank ${rank} keeps ${Text.percent(retained(layer, rank))}`,
    ].join("\n");
  }

  // The layer that an arrow key leads to: the next one in that direction.
  function next(record, layer, key, width) {
    const [x, y] = axes(record, width);
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    const ahead = record.layers.filter((one) =>
      dx ? y.of(one) === y.of(layer) && (x.of(one) - x.of(layer)) * dx > 0 : x.of(one) === x.of(layer) && (y.of(one) - y.of(layer)) * dy > 0
    );
    return d3.least(ahead, (one) => Math.abs(x.of(one) - x.of(layer)) + Math.abs(y.of(one) - y.of(layer))) ?? layer;
  }

  function outline(made, record, layer, width) {
    const [x, y] = axes(record, width);
    const [across, down] = ["x", "y"].map((name) => made.scale(name));
    const svg = d3.select(made.tagName === "svg" ? made : made.querySelector("svg:last-of-type"));
    svg.selectAll("rect.cursor").data([layer]).join((enter) => enter.insert("rect", "[aria-label=tip]").attr("class", "cursor"))
      .attr("x", across.apply(x.of(layer)) - 1)
      .attr("y", down.apply(y.of(layer)) - 1)
      .attr("width", across.bandwidth + 2)
      .attr("height", down.bandwidth + 2);
  }

  return { MEASURES, figure, told, next, outline, retained };
})();
