// What is looked at, and what is drawn again when that changes.
"use strict";

const Page = (() => {
  const at = (id) => document.getElementById(id);

  function prepare(record) {
    for (const layer of record.layers) layer.share = record.energy > 0 ? layer.energy / record.energy : 0;
    for (const setting of record.settings) {
      setting.policy = setting.spelling.split("=")[0];
      setting.share = setting.parameters / record.parameters;
    }
    record.in_order = d3.sort(record.layers, (layer) => layer.column, (layer) => layer.row);
  }

  function facts(record) {
    const pairs = (id, entries) => at(id).replaceChildren(...entries.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
    at("title").textContent = record.title;
    at("source").textContent = record.subtitle;
    pairs("facts", record.facts);
    pairs("provenance", record.provenance);
    at("notes").replaceChildren(...record.notes.map((note) => element("p", { class: "note" }, element("strong", {}, "Note: "), note)));
  }

  function layerTable(record, setting) {
    const headings = ["Layer", "Shape", "Rank", "Effective rank", "Share of energy", "Chosen rank", "Retained"];
    const table = at("layer-table");
    table.tHead.replaceChildren(element("tr", {}, ...headings.map((one, index) => element("th", { scope: "col", class: index ? "number" : undefined }, one))));
    table.tBodies[0].replaceChildren(
      ...record.in_order.map((layer) => {
        const rank = setting.rank(layer.index);
        const cells = [
          `${layer.out} × ${layer.in}`,
          layer.rank,
          layer.effective_rank.toFixed(1),
          Text.percent(layer.share),
          rank,
          Text.percent(Heatmap.retained(layer, rank)),
        ];
        return element("tr", {}, element("th", { scope: "row" }, layer.name), ...cells.map((cell) => element("td", { class: "number" }, `${cell}`)));
      })
    );
  }

  function run(record) {
    prepare(record);
    const policies = [...new Set(record.settings.map((setting) => setting.policy))];
    const first = record.settings[record.first];
    const state = {
      mode: "parameters",
      limit: record.stops.parameters.find((stop) => stop >= first.parameters) ?? record.parameters,
      policy: first.policy,
      pinned: first, // the setting that was asked for by itself, not by the limit
      layer: d3.greatest(record.layers, (layer) => layer.energy),
      measure: "effective",
    };
    let within = [];
    let chosen = first;

    function look() {
      within = policies.flatMap((policy) => {
        if (state.pinned?.policy === policy) return [state.pinned];
        return Lookup.best(record.settings.filter((one) => one.policy === policy), state.mode, state.limit) ?? [];
      });
      chosen = within.find((setting) => setting.policy === state.policy) ?? within[0] ?? chosen;
    }

    function drawHeatmap() {
      const width = at("heatmap").clientWidth;
      const made = Charts.show("heatmap", (room) => Heatmap.figure(record, room, { measure: state.measure, setting: chosen }));
      made.addEventListener("input", () => made.value && focusLayer(made.value));
      Heatmap.outline(made, record, state.layer, Math.max(260, width));
      const { label, chosen: ofSetting } = Heatmap.MEASURES[state.measure];
      at("heatmap-title").textContent = ofSetting ? `${label} (${chosen.spelling})` : label;
    }

    function drawLayer() {
      at("layer").value = state.layer.index;
      at("spectrum-title").textContent = `Spectrum of ${state.layer.name}`;
      at("readout").textContent = Heatmap.told(state.layer, chosen).replaceAll("\n", " · ");
      Charts.show("spectrum", (width) => Charts.spectrum(record, width, { layer: state.layer, setting: chosen }));
    }

    function focusLayer(layer) {
      if (layer === state.layer) return;
      state.layer = layer;
      drawLayer();
      Heatmap.outline(at("heatmap").firstChild, record, layer, Math.max(260, at("heatmap").clientWidth));
    }

    function drawFrontier() {
      const made = Charts.show("frontier", (width) => Charts.frontier(record, width, { chosen, within }));
      made.addEventListener("click", () => made.value && pin(made.value));
    }

    function drawSetting() {
      look();
      Controls.slider(record, state);
      Controls.table(record, policies, within, chosen, (policy) => {
        state.policy = policy;
        drawSetting();
      });
      Controls.chosen(record, chosen);
      Controls.say("");
      Charts.show("strips", (width) => Charts.strips(record, width, { within, policies, chosen }));
      drawHeatmap();
      drawLayer();
      drawFrontier();
      if (at("all-layers").open) layerTable(record, chosen);
    }

    function drawAll() {
      Charts.show("variance", (width) => Charts.variance(record, width));
      Quality.show(record);
      Campaign.show(record);
      drawSetting();
    }

    // One setting by itself; the other policies are shown at the same number of parameters.
    function pin(setting) {
      Object.assign(state, { pinned: setting, policy: setting.policy, mode: "parameters", limit: setting.parameters });
      at("mode-parameters").checked = true;
      drawSetting();
    }

    let asked = 0;
    const soon = (draw) => {
      cancelAnimationFrame(asked);
      asked = requestAnimationFrame(draw);
    };

    facts(record);
    at("main").hidden = false;
    Controls.modes(record, state, (mode) => {
      const of = Lookup.MODES[mode].of;
      const stops = record.stops[mode];
      const limit = Lookup.MODES[mode].most ? stops.find((stop) => stop >= of(chosen)) : stops.findLast((stop) => stop <= of(chosen));
      Object.assign(state, { mode, pinned: undefined, limit: limit ?? stops[0] });
      drawSetting();
    });
    at("limit").addEventListener("input", (event) => {
      Object.assign(state, { pinned: undefined, limit: record.stops[state.mode][event.target.value] });
      soon(drawSetting);
    });
    at("value").addEventListener("input", (event) => {
      const mine = record.settings.filter((one) => one.policy === chosen.policy);
      const setting = mine[event.target.value];
      soon(() => pin(setting));
    });
    at("metric").append(...Object.entries(Heatmap.MEASURES).map(([value, { label }]) => element("option", { value }, label)));
    at("metric").addEventListener("change", (event) => {
      state.measure = event.target.value;
      drawHeatmap();
    });
    at("layer").append(...record.in_order.map((layer) => element("option", { value: `${layer.index}` }, layer.name)));
    at("layer").addEventListener("change", (event) => focusLayer(record.layers[event.target.value]));
    at("heatmap").addEventListener("keydown", (event) => {
      if (!event.key.startsWith("Arrow")) return;
      event.preventDefault();
      focusLayer(Heatmap.next(record, state.layer, event.key, Math.max(260, at("heatmap").clientWidth)));
    });
    at("all-layers").addEventListener("toggle", () => at("all-layers").open && layerTable(record, chosen));
    Controls.never(record);
    Controls.buttons(record, () => chosen);
    drawAll();
    let wide = document.body.clientWidth;
    new ResizeObserver(() => {
      if (wide === document.body.clientWidth) return;
      wide = document.body.clientWidth;
      soon(drawAll);
    }).observe(document.body);
  }

  async function start() {
    try {
      run(await Record.read());
    } catch (error) {
      at("failure").hidden = false;
      at("failure").textContent = `This report cannot be shown: ${error}. A browser of 2023 or later is needed.`;
      throw error;
    }
  }

  return { start };
})();

Page.start();
