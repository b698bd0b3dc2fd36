package cli

import (
	"encoding/json"
	"fmt"
)

// printJSON prints v as qemu-img lays out JSON: four spaces, and nothing escaped that need not be.
func (a *app) printJSON(v any) error {
	enc := json.NewEncoder(a.out)
	enc.SetIndent("", "    ")
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("writing JSON: %w", err)
	}
	return nil
}
