package cli

import (
	"net/http"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/daemon"
)

func (c *controller) compactCommand() *cobra.Command {
	var req daemon.CompactRequest
	cmd := &cobra.Command{
		Use:   "compact [flags] NAME",
		Short: "Reclaim the free space inside the image of a disk while it is served",
		Long: `Move what stands at the end of the image's file into holes before it, and cut the
end off, while clients go on. They wait for a moment now and then: for a few
megabytes to be moved at a time, and once for as long as a check takes.

Interrupted, it stops with what has been moved. Snapshots that are being served
keep their clusters where they are.`,
		Args: arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var r daemon.CompactReply
			if err := c.call(cmd.Context(), http.MethodPost, "/v1/disk/compact", named(args[0]), req, &r); err != nil {
				return err
			}
			return c.print(r, func() {
				c.printCompacted(compactResult{args[0], req.DryRun, r.OldSize, r.NewSize, r.Moved, r.Free, r.Leaked})
				if r.SnapshotsOpen {
					c.printf("Clusters of snapshots stayed where they are: some are being served.\n")
				}
			})
		},
	}
	cmd.Flags().BoolVarP(&req.DryRun, "dry-run", "n", false, "change nothing, tell how much would be gained")
	return cmd
}
