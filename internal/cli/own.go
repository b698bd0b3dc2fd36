package cli

// ownMakers make the commands that drover has and qemu-img has not. They are offered under the name of drover only.
func ownMakers() []maker {
	return []maker{
		{"compact", (*app).compactCommand}, {"completion", (*app).completionCommand}, {"diff", (*app).diffCommand},
		{"export", (*app).exportCommand}, {"man", (*app).manCommand}, {"sum", (*app).sumCommand}, {"verify", (*app).verifyCommand},
	}
}
