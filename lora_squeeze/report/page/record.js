// What the page was made of: the record, and its long lists of numbers, which are packed.
"use strict";

const Record = (() => {
  const text = (id) => document.getElementById(id).textContent;

  async function unpacked(base64) {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  // Σ lengths of lists, as offsets of each list.
  function offsets(lengths) {
    const found = [0];
    for (const length of lengths) found.push(found[found.length - 1] + length);
    return found;
  }

  async function read() {
    const record = JSON.parse(text("record"));
    const buffer = await unpacked(text("numbers"));
    const layers = record.layers.length;
    const starts = offsets(record.layers.map((layer) => layer.values));
    const count = starts[layers];
    const values = new Float32Array(buffer, 0, count);
    const kept = new Float32Array(buffer, 4 * count, count);
    const wide = record.rank_bytes === 2 ? Uint16Array : Uint8Array;
    const ranks = new wide(buffer, 8 * count, layers * record.settings.length);
    record.layers.forEach((layer, index) => {
      layer.index = index;
      layer.sigma = values.subarray(starts[index], starts[index + 1]);
      layer.kept = kept.subarray(starts[index], starts[index + 1]); // V(1), V(2), …
    });
    record.settings.forEach((setting, index) => {
      setting.index = index;
      // The ranks of a layer under all settings lie together: that packs best.
      setting.rank = (layer) => ranks[layer * record.settings.length + index];
    });
    return record;
  }

  return { read };
})();
