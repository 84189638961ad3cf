// The limit, the table of policies, and what can be taken away: the command and ranks.json.
"use strict";

const Controls = (() => {
  const at = (id) => document.getElementById(id);

  const SYMBOL = { "as it is": "yes", fitted: "fitted", no: "no" };
  const SAID = { "as it is": "loads it as it is", fitted: "loads it, see below", no: "does not load it" };

  function modes(record, state, changed) {
    for (const [mode, { label }] of Object.entries(Lookup.MODES)) {
      if (!record.stops[mode].length) continue;
      const input = element("input", { type: "radio", name: "mode", value: mode, id: `mode-${mode}`, checked: mode === state.mode });
      input.addEventListener("change", () => changed(mode));
      at("modes").append(element("label", { for: `mode-${mode}` }, input, ` ${label}`));
    }
  }

  function limitText(record, mode, limit) {
    const { bound } = Lookup.MODES[mode];
    if (mode === "parameters") return `${bound} ${Text.percent(limit / record.parameters, 1)} (${Text.count(limit)})`;
    if (mode === "bytes") return `${bound} ${Text.bytes(limit)}`;
    return `${bound} ${Text.percent(limit, 1)}`;
  }

  function slider(record, state) {
    const input = at("limit");
    const stops = record.stops[state.mode];
    const nearest = d3.leastIndex(stops, (stop) => Math.abs(stop - state.limit));
    input.max = stops.length - 1;
    input.value = nearest;
    const text = limitText(record, state.mode, state.limit);
    at("limit-label").textContent = Lookup.MODES[state.mode].label;
    at("limit-value").textContent = text;
    input.setAttribute("aria-valuetext", text);
  }

  const number = (value, text) => element("td", { class: "number" }, element("data", { value: `${value}` }, text));

  // Runtimes that load some setting; the others are named once, below the table.
  const some = (record) => record.runtimes.filter((name) => record.verdicts.some((one) => one.some((verdict) => verdict.runtime === name && verdict.loads !== "no")));

  function never(record) {
    const known = some(record);
    const none = record.runtimes.filter((name) => !known.includes(name));
    at("never").textContent = none.length ? `Loaded by none of these, whatever the setting: ${none.join(", ")}. ` : "";
  }

  function chips(record, verdicts) {
    const cell = element("td", { class: "chips", "data-label": "Loaded by" });
    const known = some(record);
    for (const verdict of verdicts.filter((one) => known.includes(one.runtime))) {
      cell.append(
        element("span", { class: `chip ${SYMBOL[verdict.loads]}` }, verdict.runtime, element("span", { class: "unseen" }, ` ${SAID[verdict.loads]}; `)),
        " "
      );
    }
    return cell;
  }

  function row(record, policy, setting, chosen, most) {
    const input = element("input", { type: "radio", name: "policy", value: policy, id: `policy-${policy}`, checked: policy === chosen.policy, disabled: !setting });
    const name = element("label", { for: `policy-${policy}` }, input, " ", element("code", {}, setting ? setting.spelling : policy));
    const head = element("th", { scope: "row" }, name);
    if (!setting) {
      const nothing = element("td", { colspan: "7", class: "soft" }, "has no setting within this limit");
      return element("tr", { class: "none", "data-policy": policy }, head, nothing);
    }
    if (setting.energy === most) head.append(" ", element("span", { class: "badge" }, "most energy"));
    const cells = [
      number(setting.parameters, `${Text.count(setting.parameters)} (${Text.percent(setting.share, 1)})`),
      number(setting.bytes, Text.bytes(setting.bytes)),
      number(setting.energy, Text.percent(setting.energy)),
      number(setting.worst, Text.percent(setting.worst)),
      number(setting.largest, setting.smallest === setting.largest ? `${setting.largest}` : `${setting.smallest}–${setting.largest}`),
      number(setting.left_out, `${setting.left_out}`),
    ];
    const labels = ["Parameters", "Weights", "Energy kept", "Worst layer", "Ranks", "Left out"];
    cells.forEach((cell, index) => cell.setAttribute("data-label", labels[index]));
    const verdicts = record.verdicts[setting.verdict];
    const kind = policy === chosen.policy ? "chosen" : undefined;
    return element("tr", { class: kind, "data-policy": policy, "data-setting": setting.spelling }, head, ...cells, chips(record, verdicts));
  }

  // The rows are made again, so the focus has to be put back to where it was.
  function table(record, policies, within, chosen, choose) {
    const body = at("policies").tBodies[0];
    const focused = body.contains(document.activeElement) ? document.activeElement.id : "";
    const most = d3.max(within, (setting) => setting.energy);
    body.replaceChildren(
      ...policies.map((policy) => row(record, policy, within.find((one) => one.policy === policy), chosen, most))
    );
    body.querySelectorAll("input").forEach((input) => input.addEventListener("change", () => choose(input.value)));
    if (focused) at(focused)?.focus();
  }

  function servers(record, setting) {
    const lines = record.verdicts[setting.verdict].map((verdict) => {
      const padded = verdict.padded_to ? `: padded with zeros to rank ${verdict.padded_to}, as large as fixed=${verdict.padded_to}` : "";
      const why = { "as it is": "loads it as it is", fitted: `loads it with ${verdict.needs.join(" and ")}${padded}`, no: `does not load it: ${verdict.reasons.join("; ")}` };
      return element("li", { class: SYMBOL[verdict.loads] }, element("strong", {}, verdict.runtime), ` ${why[verdict.loads]}`);
    });
    const unknown = element("li", {}, "Sizes and servers are not known: this report was made from an analysis alone.");
    at("servers").replaceChildren(...(lines.length ? lines : [unknown]));
  }

  const command = (record, setting) => `${record.command.before} --policy ${setting.spelling}${record.command.after}`;

  // The plan as `lora-squeeze compress --ranks` reads it.
  function plan(record, setting) {
    const ranks = record.layers.map((layer) => [layer.name, setting.rank(layer.index)]);
    return JSON.stringify({ record: "Ranks", policy: setting.spelling, by_layer: Object.fromEntries(ranks) }, null, 1) + "\n";
  }

  function chosen(record, setting) {
    at("chosen-name").textContent = setting.spelling;
    const mine = record.settings.filter((one) => one.policy === setting.policy);
    const input = at("value");
    input.max = mine.length - 1;
    input.value = mine.indexOf(setting);
    const text = setting.spelling.split("=")[1] ?? "";
    at("value-label").textContent = `Value of ${setting.policy}`;
    at("value-value").textContent = text;
    input.setAttribute("aria-valuetext", text);
    servers(record, setting);
    at("command").textContent = command(record, setting);
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Where the clipboard is out of reach, the old way: select the text and copy the selection.
      const field = element("textarea", { class: "unseen", readonly: true });
      field.value = text;
      document.body.append(field);
      field.select();
      const copied = document.execCommand("copy");
      field.remove();
      if (!copied) return false;
    }
    return true;
  }

  function download(record, setting) {
    const link = element("a", { download: "ranks.json", href: URL.createObjectURL(new Blob([plan(record, setting)], { type: "application/json" })) });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  const say = (text) => (at("said").textContent = text);

  function buttons(record, current) {
    at("copy").addEventListener("click", async () => {
      say((await copy(command(record, current()))) ? "Copied." : "Could not be copied: select the command above.");
    });
    at("download").addEventListener("click", () => {
      download(record, current());
      say(`ranks.json holds the ranks of ${current().spelling}.`);
    });
  }

  return { modes, slider, table, chosen, buttons, say, never };
})();
