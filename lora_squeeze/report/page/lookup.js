// Which setting of a policy fits a limit. Nothing is computed but comparisons of embedded numbers.
"use strict";

const Lookup = (() => {
  // "most": as much as fits below a limit; otherwise as little as reaches it.
  const MODES = {
    parameters: { label: "Parameters", bound: "at most", most: true, of: (setting) => setting.parameters },
    bytes: { label: "File size", bound: "at most", most: true, of: (setting) => setting.bytes },
    energy: { label: "Energy kept", bound: "at least", most: false, of: (setting) => setting.energy },
    worst: { label: "Worst layer", bound: "at least", most: false, of: (setting) => setting.worst },
  };

  const more = (a, b) => a.energy > b.energy || (a.energy === b.energy && a.parameters < b.parameters);
  const fewer = (a, b) => a.parameters < b.parameters || (a.parameters === b.parameters && a.energy > b.energy);

  // The best of these settings within the limit, or undefined if none is.
  function best(settings, mode, limit) {
    const { most, of } = MODES[mode];
    const better = most ? more : fewer;
    let found;
    for (const setting of settings) {
      const within = most ? of(setting) <= limit : of(setting) >= limit;
      if (within && (found === undefined || better(setting, found))) found = setting;
    }
    return found;
  }

  return { MODES, best };
})();
