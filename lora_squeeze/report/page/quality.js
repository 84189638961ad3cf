// What was measured on a task, where it was.
"use strict";

const Quality = (() => {
  function show(record) {
    if (!record.quality) return;
  }

  return { show };
})();
