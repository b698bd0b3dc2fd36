package cli

import (
	"context"
	"time"

	"github.com/spf13/cobra"
)

// workResult is the JSON of a command that has made or changed an image.
type workResult struct {
	Command string     `json:"command"`
	Seconds float64    `json:"seconds"`
	Image   *imageInfo `json:"image"` // as info tells of it
}

// resultFlag adds --output to a command that tells programs what it has done.
func resultFlag(cmd *cobra.Command, output *string) {
	cmd.Flags().StringVar(output, "output", "human", "`format` in which the result is told: human or json")
}

// printResult tells of an image that a command has finished with.
func (a *app) printResult(ctx context.Context, command string, began time.Time, src source) error {
	seconds := time.Since(began).Seconds()
	list, err := collectInfo(ctx, &src, false)
	if err != nil {
		return err
	}
	return a.printJSON(workResult{command, seconds, list[0]})
}

// printResultOf is printResult for a new image.
func (a *app) printResultOf(ctx context.Context, command string, began time.Time, name, format string) error {
	src := source{format: format}
	if err := src.set(name); err != nil {
		return err
	}
	return a.printResult(ctx, command, began, src)
}
